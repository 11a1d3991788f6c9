"""Small talk, and questions that a scene cannot answer: what people type first, and plain answers to it."""

from __future__ import annotations

import random

SMALL_TALK: tuple[tuple[tuple[str, ...], str], ...] = (
    (("Hello!", "Hello.", "Hi!", "Hi there!", "Hey!", "Good morning!", "Good evening."),
     "Hello. Show me a picture, or ask me to draw one."),
    (("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Are you a robot?"),
     "I am a small model that knows a little world of scenes."),
    (("What can you do?", "What can you do for me?", "How can you help me?", "Help.", "What are you good for?"),
     "I describe pictures of small scenes, answer questions about them, draw them and change them."),
    (("What do you know?", "Which things do you know?", "What can you draw?"),
     "A hundred and fifty things, such as cats, ships and cakes, in three styles on ten backgrounds."),
    (("Thank you.", "Thank you!", "Thanks!", "Thanks a lot.", "Thank you very much."), "You are welcome."),
    (("Well done.", "Nice picture!", "Great!", "I like it.", "That is nice."), "Thank you."),
    (("How are you?", "How are you doing?", "How is it going?"), "I am fine. What shall I draw?"),
    (("Goodbye.", "Bye!", "See you.", "Good night."), "Goodbye."),
    (("Yes.", "No.", "OK.", "Okay.", "Sure."), "What shall I draw?"),
    (("Sorry.", "I am sorry.", "Never mind."), "No problem."),
    (("Do you speak German?", "Can you speak French?", "Which languages do you speak?"), "I only speak English."),
)
UNANSWERABLE = (
    "What is the weather like tomorrow?", "What time is it?", "Who painted this?", "Who made this picture?",
    "Where was this taken?", "When was it taken?", "What is the meaning of life?", "What is two plus two?",
    "What is the capital of France?", "Who is the president?", "How much does it cost?", "Why?", "What is its name?",
    "How old is it?", "Is it happy?", "What will happen next?", "Tell me a joke.", "Can you write a poem?",
    "Which camera was used?", "What is the news today?", "Are you sure?", "How heavy is it?")
UNKNOWN = "I do not know. I only know small scenes."
ANSWERS = {UNKNOWN, *(answer for _, answer in SMALL_TALK)}


def small_talk(shake: random.Random, shown: bool) -> tuple[str, str]:
    """Something that people say and the answer to it; `shown`: after or beside a picture, where it is more often a
    question that the picture cannot answer."""
    if shake.random() < (0.7 if shown else 0.3):
        return shake.choice(UNANSWERABLE), UNKNOWN
    asked, answer = shake.choice(SMALL_TALK)
    return shake.choice(asked), answer
