// What the parts of the page share: elements, numbers as text, the API key, server-sent events.
// Whatever comes from the server becomes text of a node, and never markup.

const SVG = "http://www.w3.org/2000/svg";
const KEY = "kairos_jax.key";

export const byId = (id) => document.getElementById(id);

/** Sets a node's text where it has changed, so that what stays the same costs nothing. */
export function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** A new element of HTML with a class and children. */
export function element(tag, name = "", ...children) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...children);
  return node;
}

/** The element of an SVG under a name, made when it is first asked for. */
export function part(svg, tag, name) {
  svg.parts ??= new Map();
  let node = svg.parts.get(name);
  if (!node) {
    node = document.createElementNS(SVG, tag);
    node.setAttribute("class", name);
    svg.parts.set(name, node);
    svg.append(node);
  }
  return node;
}

export function attributes(node, values) {
  for (const [name, value] of Object.entries(values)) node.setAttribute(name, value);
}

// Numbers.

export const count = (value) => Math.round(value).toLocaleString("en");

// No line is broken between a number and its unit.
const of = (value, digits, unit) => `${value.toFixed(digits)}\u00a0${unit}`;

export const percent = (share) => of(100 * share, share && share < 0.9995 ? 1 : 0, "%");

/** Seconds, in the unit that suits them, with two or three digits. */
export function seconds(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0\u00a0s";
  if (value < 0) return `−${seconds(-value)}`;
  if (value < 0.00995) return of(1000 * value, 1, "ms");
  if (value < 0.9995) return of(1000 * value, 0, "ms");
  if (value < 99.95) return of(value, value < 9.995 ? 2 : 1, "s");
  return value < 5999 ? of(value / 60, 1, "min") : of(value / 3600, 1, "h");
}

/** A bound that somebody chose, as it was chosen. */
export const bound = (value) => (value < 1 ? `${+(1000 * value).toPrecision(6)}\u00a0ms`
  : `${+value.toPrecision(6)}\u00a0s`);

// The server.

/** Keeps the API key for as long as this tab is open; a header holds no other characters. */
export function keepKey(key) {
  sessionStorage.setItem(KEY, key.replace(/[^\x21-\x7e]/g, ""));
}

/** A request with the key, if there is one. Paths are relative: a proxy may serve us below one. */
export function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  return fetch(path, { ...options, headers });
}

/** Why the server refused, as it says itself. */
export async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `the server answered with status ${response.status}`;
  }
}

/** The data of each server-sent event of a response, as it comes. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const whole = (rest + value).split("\n\n");
      rest = whole.pop();
      for (const event of whole) {
        if (event.startsWith("data: ")) yield event.slice(6);
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export const later = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
