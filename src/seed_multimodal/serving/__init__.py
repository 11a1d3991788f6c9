"""The server of a system and the chat page.

    schema        requests and answers of the HTTP routes
    backend       `Backend`: one system, its queue, limits and metrics
    responses     answers in OpenAI's two forms, whole and as events
    origin        which web pages may use a program on loopback
    connections   bodies, answers and the ends of connections below the routes
    app           `create_app`, `listen`, `serve`: Flask routes and the server
    client        `ModelClient`, `ModelCard`: what the page knows about models, and its requests
    conversation_log  `ConversationLog`: the page's log of conversations and votes
    turns         `Turn`, `Picture`: the page's conversations
    chat          `Chat`: a conversation that is shown, its answer, and what the browser gets of it
    chat_session  `ChatSession`: a visit, and the page's event handlers
    page          `build`, `launch`: the Gradio page

Nothing is imported here: the page runs without torch, the server without Gradio.
"""
