/* A click on a known word writes it into the message: `js_on_load` of the panel. */
element.addEventListener('click', ({ target }) => {
    const word = target.closest('button')?.textContent
    const box = document.querySelector('#message textarea')
    if (!word || !box) return
    const before = box.value.slice(0, box.selectionStart)
    const blank = before && !before.endsWith(' ') ? ' ' : ''
    box.setRangeText(blank + word, box.selectionStart, box.selectionEnd, 'end')
    box.dispatchEvent(new Event('input', { bubbles: true }))
})
