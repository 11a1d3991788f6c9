/* The list of conversations: `js_on_load` of the component that gets the updates of all events.

An update is a list of snapshots of conversations (`Chat.snapshot`): each is kept, and shown if it is open.
What is kept is an item of the browser's storage: {time, model, turns, revision, name, pinned} below
"seed-chat-KEY". A tab has the key of its open one in its session's storage. Events and snapshots name a
conversation by an ID, which is one tab's alone: where another tab has changed the item, the tab goes on under a
new key.
*/
const PREFIX = 'seed-chat-'
const DARK = 'seed-dark'
const SECONDS_TO_UPDATE = 5
let local = {}
let tab = {}
try {
    local = localStorage
    tab = sessionStorage
} catch { /* the visitor allows no storage */ }
// The tab's conversations by ID: {key, read, revision, turns, back}: the revision of the item as the tab has read or
// written it last, revision and turns of the newest snapshot, and messages that return to the box when it is open.
// No key: it is not kept any more.
const conversations = {}
const items = {} // {text, item}: of the storage, and parsed
const list = element.querySelector('ul')
const notice = element.querySelector('p')
const search = element.querySelector('input')
let open = {} // the newest snapshot of the open conversation
const returned = new Set() // IDs of messages that returned to the box
let chosen = '[]' // the paths of the files in the box
let isTaken = false
let n_updates = 0
let listed = ''

const EMPTY = { text: '', files: [] }
const newId = () => Date.now().toString(36) + Math.random().toString(36).slice(2)

function parsed(key) {
    const text = local[PREFIX + key]
    if (items[key]?.text !== text) items[key] = { text, item: parse(key, text) }
    return items[key]?.item ?? null
}

function parse(key, text) {
    try {
        const item = JSON.parse(text)
        const texts = textsOf(item.turns).join('\n')
        return { revision: 0, ...item, key, texts, title: item.name || titleOf(item.turns) }
    } catch {
        return null
    }
}

const textsOf = (turns) =>
    turns.flatMap(({ parts }) => parts.filter((part) => typeof part === 'string' && part.trim()))

const titleOf = (turns) => textsOf(turns.slice(0, 1))[0]?.trim().slice(0, 80) || 'Images'

// ---- updates

function receive(snapshots) {
    n_updates += 1
    for (const snapshot of snapshots) {
        const { id, replaces, revision } = snapshot
        const isNew = !(id in conversations)
        const conversation = conversations[id] ??= { key: id, revision: 0, back: [] }
        const isOpen = id === open.id || (isNew && replaces === open.id)
        const back = snapshot.returned.filter((message) => !returned.has(message.id))
        for (const message of back) returned.add(message.id)
        conversation.back.push(...back)
        // The last update of an event is whole; Gradio's differences before it may be wrong.
        if (revision < conversation.revision) continue
        conversation.revision = revision
        save(conversation, snapshot, isOpen ? [] : conversation.back)
        if (isOpen) open = snapshot
    }
    show(open)
}

// What the page shows, and events name.
function show(snapshot) {
    open = snapshot
    const { id, model, turns, revision } = snapshot
    tab[PREFIX] = conversations[id].key
    props.value = { id, model, turns, revision }
    trigger('apply')
    list_all()
}

const page = {
    // An error ends the event of a box whose files are the same: letters are no server's concern.
    choose(box) {
        const files = JSON.stringify(box?.files.map(({ path }) => path) ?? [])
        if (files === chosen) throw Error('the same files')
        chosen = files
        return []
    },

    // The message leaves its box for the server; an error ends the event of an empty one, and of the
    // second click of a double one.
    take(box) {
        if (isTaken || (!box?.text.trim() && !box?.files.length)) throw Error('nothing to send')
        isTaken = true
        setTimeout(() => { isTaken = false })
        // Gradio does not deliver an event that begins while its stream of updates ends; another does.
        const before = n_updates
        setTimeout(() => n_updates === before && trigger('select'), SECONDS_TO_UPDATE * 1000)
        document.querySelector('#chat .bubble-wrap').scrollTo(0, 1e9)
        return [box, EMPTY]
    },

    // The conversation and the box, to which a message returns in front of what was typed since.
    show(box) {
        const { messages, is_busy } = open
        const { back } = conversations[open.id]
        const update = { __type__: 'update', submit_btn: !is_busy, stop_btn: is_busy }
        if (back.length) {
            const parts = [...back.splice(0), box ?? EMPTY]
            const text = parts.map((part) => part.text).filter(Boolean).join('\n')
            update.value = { text, files: parts.flatMap(({ files }) => files) }
        }
        document.querySelector('#chat')?.classList.toggle('busy', is_busy)
        return [{ __type__: 'update', value: messages }, update]
    },

    // Refused files leave the box; files that no browser shows get an image that it does.
    refuse(known, box) {
        const { refused = [], images = {} } = known ?? {}
        const files = box.files
            .filter(({ path }) => !refused.includes(path))
            .map((file) => ({ ...file, url: images[file.path]?.url ?? file.url }))
        const isSame = JSON.stringify(files) === JSON.stringify(box.files)
        return { __type__: 'update', ...(isSame ? {} : { value: { ...box, files } }) }
    },

    dark() {
        local[DARK] = Number(document.body.classList.toggle('dark'))
    },
}

// ---- the storage

function save(conversation, snapshot, back = []) {
    const { model, revision } = snapshot
    const turns = withBack(snapshot.turns, back)
    // An opened chat is not written: other tabs would take it for changed.
    const text = JSON.stringify(turns)
    if (conversation.key === null || conversation.turns === text) return
    let stored = parsed(conversation.key)
    if (stored && stored.revision !== conversation.read) {
        conversation.key = newId()
        stored = null
    }
    const { name, pinned } = stored ?? {}
    if (!keep(conversation.key, { time: Date.now(), model, turns, revision, name, pinned })) return
    if (conversation.key === tab[PREFIX]) notice.textContent = ''
    conversation.read = parsed(conversation.key)?.revision
    conversation.turns = text
}

// What returns to the box of a chat that is not open is stored as its last message without answer.
function withBack(turns, back) {
    if (!back.length) return turns
    const answered = turns.filter((turn, index) => index < turns.length - 1 || turn.role !== 'user')
    const messages = [...turns.slice(answered.length), ...back.map(({ turn }) => turn)]
    const parts = messages.flatMap((turn) => ['\n', ...turn.parts]).slice(1)
    return [...answered, { ...messages[0], parts }]
}

function keep(key, item) {
    try {
        if (item.turns.length) local[PREFIX + key] = JSON.stringify(item)
        else delete local[PREFIX + key]
        return true
    } catch {
        notice.textContent = 'The storage of this browser is full, so this chat is not kept: ' +
            'export it, or delete another one.'
    }
}

// Open a conversation of the list, or a new one.
function choose(key, event = 'select') {
    const { model, turns, revision } = parsed(key) ?? { model: open.model ?? '', turns: [], revision: 0 }
    const isOther = model !== (open.model ?? model)
    const ids = Object.keys(conversations)
    const isKnown = (id) => conversations[id].key === key && conversations[id].read === revision
    const id = ids.find(isKnown) ?? newId()
    conversations[id] ??= { key, read: revision, revision, turns: JSON.stringify(turns), back: [] }
    const messages = turns.length ? [waiting] : []
    notice.textContent = ''
    // The box gets what returned: the server must not return it, too.
    const isBack = conversations[id].back.length && turns.at(-1)?.role === 'user'
    const sent = isBack ? turns.slice(0, -1) : turns
    show({ id, model, turns: sent, revision: conversations[id].revision, messages, is_busy: false })
    trigger(isOther ? 'input' : event)
}

const waiting = { role: 'assistant', content: [{ type: 'text', text: '…' }] }

function remove({ key, title }) {
    if (!confirm(`Delete “${title}”? It cannot be brought back.`)) return
    delete local[PREFIX + key]
    const own = Object.values(conversations).filter((conversation) => conversation.key === key)
    for (const conversation of own) conversation.key = null
    if (key === tab[PREFIX]) choose(newId())
    else save(conversations[open.id], open) // the storage may have been full
    list_all()
    list.querySelector('button')?.focus()
}

function rename({ key, title }) {
    const name = prompt('Name of this chat', title)?.trim()
    if (name) describe(key, { name })
}

const pin = ({ key, pinned }) => describe(key, { pinned: !pinned })

// Change what the list says of a chat, whose turns may have grown since it was listed.
function describe(key, changes) {
    const stored = parsed(key)
    if (stored) {
        const { time, model, turns, revision, name, pinned } = stored
        keep(key, { time, model, turns, revision, name, pinned, ...changes })
    }
    list_all()
}

// ---- the list

function list_all() {
    const names = Object.keys(local).filter((name) => name.startsWith(PREFIX))
    const words = search.value.trim().toLowerCase()
    const found = names
        .map((name) => parsed(name.slice(PREFIX.length)))
        .filter((item) => item && `${item.title} ${item.texts}`.toLowerCase().includes(words))
    found.sort((first, second) =>
        (second.pinned ?? false) - (first.pinned ?? false) || second.time - first.time)
    // An open menu, the focus and a click stay while answers grow.
    const now = JSON.stringify([tab[PREFIX], ...found.map(({ key, title, pinned }) => [key, title, pinned])])
    if (now !== listed) list.replaceChildren(...found.map(itemOf))
    listed = now
}

function itemOf(stored) {
    const { key, title, pinned } = stored
    const item = document.createElement('li')
    const isOpen = key === tab[PREFIX]
    const choice = button(pinned ? `★ ${title}` : title, title, () => {
        choose(key)
        leave_sidebar()
    })
    choice.className = 'choice'
    if (isOpen) choice.setAttribute('aria-current', 'true')

    // A menu of what can be done with it.
    const menu = document.createElement('details')
    const summary = document.createElement('summary')
    summary.textContent = '⋯'
    summary.setAttribute('aria-label', `More for “${title}”`)
    menu.append(
        summary,
        button(pinned ? 'Unpin' : 'Pin', `${pinned ? 'Unpin' : 'Pin'} “${title}”`, () => pin(stored)),
        button('Rename', `Rename “${title}”`, () => rename(stored)),
        ...(isOpen ? [button('Export', 'Export this chat', () => save_page(title))] : []),
        button('Delete', `Delete “${title}”`, () => remove(stored)),
    )
    menu.onfocusout = ({ relatedTarget }) => menu.contains(relatedTarget) || (menu.open = false)
    item.append(choice, menu)
    return item
}

function button(text, label, action) {
    const made = document.createElement('button')
    made.textContent = text
    made.title = label
    made.setAttribute('aria-label', label)
    made.onclick = action
    return made
}

// ---- export

// The open conversation as a page of its own, with its images.
async function save_page(title) {
    const page = document.implementation.createHTMLDocument(title)
    page.head.insertAdjacentHTML('beforeend', '<meta charset="utf-8"><style>' +
        'body {max-width: 45em; margin: 2em auto; padding: 0 1em; font: 16px/1.5 system-ui}' +
        '.user {margin: 1.5em 0 .5em; font-weight: bold} img {width: 256px; max-width: 100%}' +
        '</style>')
    for (const row of document.querySelectorAll('#chat .message-row')) {
        const turn = page.createElement('div')
        turn.className = row.classList.contains('user-row') ? 'user' : 'answer'
        for (const part of row.querySelectorAll('.md, img')) {
            // What is folded is no part of the conversation.
            if (part.closest('.thought-group')?.querySelector('[aria-busy="false"]')) continue
            const copy = page.createElement(part.tagName === 'IMG' ? 'img' : 'p')
            if (part.tagName === 'IMG') copy.src = await dataUrl(part.src)
            else copy.textContent = part.textContent.trim()
            turn.append(copy)
        }
        page.body.append(turn)
    }
    const link = document.createElement('a')
    link.href = URL.createObjectURL(
        new Blob(['<!doctype html>', page.documentElement.outerHTML], { type: 'text/html' }))
    link.download = `${title.replace(/[^\p{L}\p{N}]+/gu, ' ').trim() || 'chat'}.html`
    link.click()
    URL.revokeObjectURL(link.href)
}

async function dataUrl(address) {
    const blob = await (await fetch(address)).blob()
    return new Promise((resolve) => {
        const reader = new FileReader()
        reader.onload = () => resolve(reader.result)
        reader.readAsDataURL(blob)
    })
}

// ---- the sidebars: named by what they hold; the list covers a phone's window

const sidebar = element.closest('.sidebar')
for (const bar of document.querySelectorAll('.sidebar')) {
    const toggle = bar.querySelector('.toggle-button')
    toggle?.setAttribute('aria-label', bar === sidebar ? 'Chats' : 'Settings')
}

function choose_sidebar(isOpen) {
    if (sidebar.classList.contains('open') !== isOpen) sidebar.querySelector('.toggle-button')?.click()
}

const wide = matchMedia('(min-width: 901px)')

function leave_sidebar() {
    if (wide.matches) document.querySelector('#message textarea')?.focus()
    else choose_sidebar(false)
}

// ---- what Gradio leaves out or says wrong, for screen readers

const MENDED = [
    ['#chat .image-container > button', 'aria-label', 'Show the image whole'],
    ['#chat .thought-group .arrow button', 'aria-label', 'Details'],
    ['#chat .thought-group .title', 'role', ''], // its arrow is the button
    ['#chat .thought-group .title', 'tabindex', ''],
    ['#chat .examples, #message .thumbnail-wrapper', 'role', ''],
    ['.empty[aria-label]', 'role', 'img'],
]

function mend() {
    for (const [selector, name, value] of MENDED) {
        for (const part of document.querySelectorAll(selector)) {
            if (value) part.setAttribute(name, value)
            else part.removeAttribute(name)
        }
    }
}
new MutationObserver(mend).observe(document.body, { childList: true, subtree: true })

// ---- texts: the server sends them as HTML, in which they are edited and copied as they were

function plain(text) {
    const area = document.createElement('textarea')
    area.innerHTML = text
    return area.value
}

function edit_plain() {
    for (const area of document.querySelectorAll('#chat .edit-textarea')) {
        area.value = plain(area.value)
        area.dispatchEvent(new Event('input', { bubbles: true }))
    }
}

const copy = navigator.clipboard?.writeText.bind(navigator.clipboard)
if (copy) navigator.clipboard.writeText = (text) => copy(plain(text))

// ---- events

element.closest('#conversations').page = page
watch('value', () => Array.isArray(props.value) && receive(props.value))
addEventListener('storage', list_all)
search.addEventListener('input', list_all)
wide.addEventListener('change', ({ matches }) => choose_sidebar(matches))
addEventListener('click', ({ target }) => {
    if (target.closest('#new')) {
        choose(newId())
        leave_sidebar()
    }
    if (target.closest('#chat [aria-label="Edit"]')) setTimeout(edit_plain)
    const image = target.closest('#chat .image-container > button')?.parentElement
    if (image && document.fullscreenElement) document.exitFullscreen()
    else image?.querySelector('[aria-label="Fullscreen"]')?.click()
})
if (DARK in local) document.body.classList.toggle('dark', local[DARK] === '1')
choose_sidebar(wide.matches)
choose(tab[PREFIX] ?? newId(), 'input')
