/* The list of conversations: `js_on_load` of the component whose value is the tab's conversation.

Each conversation is an item of the browser's storage, so that tabs do not overwrite each other's:
{time, model, turns} below "seed-chat-ID". A tab knows its own by the ID in its session's storage.
*/
const PREFIX = 'seed-chat-'
let local = {}
let tab = {}
try {
    local = localStorage
    tab = sessionStorage
} catch { /* the visitor allows no storage */ }
const read = {} // what this tab has read or written last, by ID
const copies = {} // IDs under which this tab goes on with conversations that another tab changed
const deleted = new Set()
const list = element.querySelector("ul")
const notice = element.querySelector('p')
let shown = ''

function parsed(id) {
    try {
        const { time, model, turns } = JSON.parse(local[PREFIX + id])
        return { id, time, model, turns, title: titleOf(turns) }
    } catch {
        return null
    }
}

function titleOf(turns) {
    const texts = turns[0].parts.filter((part) => typeof part === 'string' && part.trim())
    return texts[0]?.trim().slice(0, 80) || 'Images'
}

// ---- the storage

function save(conversation) {
    if (!conversation || deleted.has(conversation.id)) return
    const { model, turns } = conversation
    let id = copies[conversation.id] ?? conversation.id
    const stored = local[PREFIX + id]
    if (stored !== undefined && stored !== read[id]) {
        id = Date.now().toString(36) + Math.random().toString(36).slice(2)
        copies[conversation.id] = id
    }
    tab[PREFIX] = id
    const text = JSON.stringify({ time: Date.now(), model, turns })
    notice.textContent = ''
    try {
        if (turns.length) local[PREFIX + id] = text
        else delete local[PREFIX + id]
        read[id] = local[PREFIX + id]
    } catch {
        notice.textContent = 'The storage of this browser is full, so this chat is not kept: ' +
            'export it, or delete another one.'
    }
    // Not while an answer grows.
    if (shown !== `${id} ${turns.length}`) show()
}

function open(id) {
    const conversation = id === undefined ? null : parsed(id)
    if (conversation) {
        read[id] = local[PREFIX + id]
        tab[PREFIX] = id
        delete copies[id]
        const { model, turns } = conversation
        props.value = { id, model, turns }
    }
    trigger('select')
    show()
}

function remove({ id, title }) {
    if (!confirm(`Delete “${title}”? It cannot be brought back.`)) return
    delete local[PREFIX + id]
    if (id === tab[PREFIX]) {
        deleted.add(props.value?.id).add(id)
        document.querySelector('#new').click()
    }
    show()
    list.querySelector('button')?.focus()
}

// ---- the list

function show() {
    const ids = Object.keys(local).filter((key) => key.startsWith(PREFIX))
    const conversations = ids.map((key) => parsed(key.slice(PREFIX.length))).filter(Boolean)
    conversations.sort((first, second) => second.time - first.time)
    list.replaceChildren(...conversations.map(itemOf))
    const turns = conversations.find(({ id }) => id === tab[PREFIX])?.turns
    shown = `${tab[PREFIX]} ${turns?.length ?? 0}`
}

function itemOf(conversation) {
    const { id, title } = conversation
    const item = document.createElement('li')
    const isOpen = id === tab[PREFIX]
    const choice = button('choice', title, title, () => {
        if (!isOpen) open(id)
        leave_sidebar()
    })
    if (isOpen) {
        choice.setAttribute('aria-current', 'true')
        item.append(choice, button('', '↓', 'Export this chat', () => save_page(title)))
    } else item.append(choice)
    item.append(button('', '✕', `Delete “${title}”`, () => remove(conversation)))
    return item
}

function button(name, text, label, action) {
    const made = document.createElement('button')
    made.className = name
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

// ---- the sidebar, which covers a phone's window

function choose_sidebar(isOpen) {
    const sidebar = element.closest('.sidebar')
    if (sidebar.classList.contains('open') !== isOpen) {
        sidebar.querySelector('.toggle-button')?.click()
    }
}

const isWide = () => innerWidth > 900

function leave_sidebar() {
    if (isWide()) document.querySelector('#message textarea')?.focus()
    else choose_sidebar(false)
}

watch('value', () => save(props.value))
addEventListener('storage', show)
addEventListener('click', ({ target }) => target.closest('#new') && leave_sidebar())
choose_sidebar(isWide())
open(tab[PREFIX])
