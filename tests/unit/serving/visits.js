/* Tabs of the page without Gradio: `conversations.js` and the message box of each.

Gradio's part: a value of the list comes in (`update`), triggers run after the script that made them,
and each other event is a request [event, value of the list, argument] for the server.
*/
const chance = Object.create(Math, { random: { value: () => (++clock % 9973) / 9973 } })
let clock = 0
let code = ''
let html = ''
let locals = {}
let sessions = {}
let tabs = {}

function reset(...sources) {
    [code, html] = sources
    locals = {}
    sessions = {}
    tabs = {}
    clock = 0
    document.body.innerHTML = '<div id="chat"><div class="bubble-wrap"></div></div>'
}

function load(name, visitor) {
    tabs[name]?.element.remove()
    const bar = document.createElement('div')
    bar.innerHTML = `<div class="sidebar"><div id="conversations"><div>${html}</div></div></div>`
    document.body.append(bar)
    const root = bar.querySelector('#conversations')
    const tab = {
        element: bar, root, watchers: [], later: [], handlers: {}, triggers: [], requests: [], props: {}, chat: [],
        local: locals[visitor] ??= {}, session: sessions[name] ??= {},
        box: { text: '', files: [] }, isChoosing: false,
    }
    tab.seen = JSON.stringify(tab.box)
    const globals = {
        element: root.firstChild, trigger: (type) => tab.triggers.push(type), props: tab.props,
        watch: (_, watcher) => tab.watchers.push(watcher), confirm: () => true, prompt: () => 'A name',
        localStorage: tab.local, sessionStorage: tab.session, Math: chance,
        Date: { now: () => ++clock }, matchMedia: () => ({ matches: true, addEventListener() {} }),
        addEventListener: (type, handler) => { tab.handlers[type] = handler },
        setTimeout: (handler) => tab.later.push(handler),
        MutationObserver: class { observe() {} }, // those of thousands of tabs would take minutes
    }
    tabs[name] = tab
    const chat = document.querySelector('#chat')
    chat.remove() // Gradio makes it later than the list
    const requests = run(tab, () => Function(...Object.keys(globals), code)(...Object.values(globals)))
    document.body.append(chat)
    return requests
}

// What a visitor or Gradio does in a tab, and what follows at once; returns its requests.
function run(tab, action) {
    const before = JSON.stringify(tab.local)
    action(tab)
    while (tab.triggers.length) {
        const type = tab.triggers.shift()
        if (type === 'apply') apply(tab, tab.root.page.show(tab.box))
        else request(tab, type)
    }
    if (JSON.stringify(tab.box) !== tab.seen && !tab.isChoosing) {
        tab.seen = JSON.stringify(tab.box)
        tab.isChoosing = true
        request(tab, 'change', tab.box)
    }
    if (JSON.stringify(tab.local) !== before) {
        const others = Object.values(tabs).filter(({ local }) => local === tab.local)
        for (const other of others) if (other !== tab) other.handlers.storage()
    }
    for (const handler of tab.later.splice(0)) handler()
    return tab.requests.splice(0)
}

const request = (tab, type, argument = null) =>
    tab.requests.push(JSON.parse(JSON.stringify([type, tab.props.value ?? null, argument])))

function apply(tab, [chat, box]) {
    if ('value' in chat) tab.chat = chat.value
    if ('value' in box) tab.box = box.value
}

const actions = {
    update(tab, snapshots) {
        if (JSON.stringify(tab.props.value) === JSON.stringify(snapshots)) return
        tab.props.value = snapshots
        for (const watcher of tab.watchers) watcher()
    },
    refuse(tab, known) {
        tab.isChoosing = false
        apply(tab, [{}, tab.root.page.refuse(known, tab.box)])
    },
    type(tab, text) {
        tab.box = { ...tab.box, text: [tab.box.text, text].filter(Boolean).join(' ') }
    },
    attach(tab, path) {
        tab.box = { ...tab.box, files: [...tab.box.files, { path }] }
    },
    send(tab) {
        let taken
        try {
            taken = tab.root.page.take(tab.box)
        } catch {
            return // an empty message
        }
        tab.box = taken[1]
        request(tab, 'submit', taken[0])
    },
    new(tab) {
        tab.handlers.click({ target: { closest: (selector) => selector === '#new' } })
    },
    open: (tab, index) => tab.root.querySelectorAll('.choice')[index].click(),
    choose_in_menu(tab, [index, text]) {
        const menu = tab.root.querySelectorAll('details')[index]
        for (const item of menu.querySelectorAll('button')) {
            if (item.textContent === text) item.click()
        }
    },
    edit(tab, { index, value }) {
        tab.chat[index].content = [{ type: 'text', text: value }] // as Gradio does
        request(tab, 'edit', { index, value })
    },
    events: (tab, types) => types.forEach((type) => request(tab, type)),
}

const act = (name, action, argument) => run(tabs[name], (tab) => actions[action](tab, argument))

function states() {
    const stateOf = ({ root, box, chat, local, session, props }) => {
        const chats = Object.entries(local).map(([key, item]) => [key.slice(10), JSON.parse(item)])
        const marked = [...root.querySelectorAll('.choice[aria-current]')].map(({ title }) => title)
        const n = root.querySelectorAll('.choice').length
        const key = session['seed-chat-']
        return { box, chat, chats: Object.fromEntries(chats), key, id: props.value?.id, marked, n }
    }
    return Object.fromEntries(Object.entries(tabs).map(([name, tab]) => [name, stateOf(tab)]))
}
