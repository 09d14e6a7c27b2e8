// What the page's terms mean: shown beside a term while the pointer or the focus is on it.
//
// A term is a button whose aria-describedby names its explanation, so that a screen reader says it
// too. Escape puts it away, and the pointer may rest on it.

import { byId, element } from "./common.js";

const MARGIN = 8;

/** The term that is explained at present. */
let shown = null;

/** A word that is explained in #tips, as tip-NAME. */
export function term(word, name = word) {
  const node = element("button", "term", word);
  node.type = "button";
  node.setAttribute("aria-describedby", `tip-${name}`);
  return node;
}

const tipOf = (node) => byId(node.getAttribute("aria-describedby"));

function show(node) {
  if (shown === node) return;
  hide();
  shown = node;
  const tip = tipOf(node);
  tip.hidden = false;
  const at = node.getBoundingClientRect();
  const room = document.documentElement.clientWidth;
  const left = Math.max(MARGIN, Math.min(at.left, room - tip.offsetWidth - MARGIN));
  const below = at.bottom + tip.offsetHeight < window.innerHeight;
  tip.style.left = `${left + window.scrollX}px`;
  tip.style.top = `${window.scrollY + (below ? at.bottom : at.top - tip.offsetHeight)}px`;
}

function hide() {
  if (shown) tipOf(shown).hidden = true;
  shown = null;
}

const termOf = (target) => target?.closest?.(".term");

for (const kind of ["pointerover", "focusin", "click"]) {
  document.addEventListener(kind, ({ target }) => {
    const node = termOf(target);
    if (node) show(node);
  });
}
document.addEventListener("pointerout", ({ relatedTarget: to }) => {
  if (!shown || shown === document.activeElement) return;
  if (termOf(to) !== shown && !tipOf(shown).contains(to)) hide();
});
document.addEventListener("focusout", hide);
document.addEventListener("keydown", ({ key }) => {
  if (key === "Escape") hide();
});
