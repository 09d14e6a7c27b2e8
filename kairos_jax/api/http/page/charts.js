// Drawings: columns of a histogram, attainment and rates of the last minutes, and step times.

import { attributes, count, element, part, percent, say, seconds } from "./common.js";

/** Columns of how many there are up to each bound. `what`: of what, for those who cannot see it. */
export function histogram(box, { bounds, counts, count: all, late }, what) {
  while (box.children.length < counts.length) {
    box.append(element("div", "", element("span"), element("i"), element("span")));
  }
  const most = Math.max(...counts, 1);
  counts.forEach((number, index) => {
    const column = box.children[index];
    const [above, bar, below] = column.children;
    const last = index === bounds.length;
    column.classList.toggle("behind", !last && bounds[index] <= 0);
    say(above, number ? count(number) : "");
    bar.style.setProperty("--share", number / most);
    bar.classList.toggle("some", number > 0);
    const bound = `${bounds[last ? index - 1 : index]}`.replace("-", "−");
    say(below, last ? `${bound}+` : index ? bound : `<${bound}`);
  });
  box.setAttribute("aria-label", `${what}: ${count(all)}, of which ${count(late)} below zero`);
}

/** For each slot of time, how many kept both SLOs and how many did not. */
export function attainment(svg, slots) {
  const { width, height } = area(svg);
  const most = Math.max(...slots.map(([all]) => all), 1);
  const [left, top] = [8 + 7.5 * count(most).length, 8];
  const step = (width - left) / slots.length;
  const scale = (height - top - 1) / most;
  const met = [];
  const missed = [];
  slots.forEach(([all, , , both], index) => {
    const x = left + index * step;
    const w = Math.max(step - 1.5, 0.5);
    if (both) met.push(rectangle(x, height - 1 - both * scale, w, both * scale));
    if (all > both) missed.push(rectangle(x, height - 1 - all * scale, w, (all - both) * scale));
  });
  attributes(part(svg, "path", "frame"), { d: `M${left} ${height - 0.5}H${width}M${left} ${top}H${width}` });
  attributes(part(svg, "path", "met"), { d: met.join("") });
  attributes(part(svg, "path", "missed"), { d: missed.join("") });
  label(svg, "most", left - 5, top + 5, count(most), "end");
  label(svg, "none", left - 5, height - 2, "0", "end");
  const [all, , , both] = sums(slots);
  const words = all ? `${percent(both / all)} of ${count(all)} requests kept both SLOs` : "No requests";
  svg.setAttribute("aria-label", words);
}

/** Lines of how many came a second; `lines`: the place in a slot of what each counts, by its name.
    The last slot is not over, so it is left out. Returns the newest of each. */
export function rates(svg, { slot_s, slots }, lines) {
  const { width, height } = area(svg);
  const whole = slots.slice(0, -1);
  const values = Object.values(lines).map((place) => whole.map((slot) => slot[place] / slot_s));
  const most = Math.max(...values.flat(), 1 / slot_s);
  const text = rate(most);
  const [left, top, bottom] = [8 + 7.5 * text.length, 8, height - 1];
  const x = (index) => left + (index / (whole.length - 1)) * (width - left - 1);
  const y = (value) => bottom - (value / most) * (bottom - top);
  attributes(part(svg, "path", "frame"), { d: `M${left} ${bottom + 0.5}H${width}M${left} ${top}H${width}` });
  Object.keys(lines).forEach((name, line) => {
    const points = values[line].map((value, index) => `${round(x(index))} ${round(y(value))}`);
    attributes(part(svg, "path", `rate ${name}`), { d: `M${points.join("L")}` });
  });
  label(svg, "most", left - 5, top + 5, text, "end");
  label(svg, "none", left - 5, height - 2, "0", "end");
  const newest = values.map((each) => each.at(-1));
  const words = Object.keys(lines).map((name, line) => `${rate(newest[line])} ${name}`).join(", ");
  svg.setAttribute("aria-label", `${words}; at most ${text} in any ${slot_s} seconds`);
  return newest;
}

/** So many a second. */
export const rate = (value) => `${value < 9.95 ? +value.toFixed(1) : count(value)}/s`;

/** The sums over all slots of what each counts. */
export function sums(slots) {
  return slots.reduce((total, slot) => total.map((value, index) => value + slot[index]));
}

/** Measured and predicted step times over the last `span` seconds, beside the TPOT, if any. */
export function steps(svg, points, now, span, tpot) {
  const { width, height } = area(svg);
  const peak = Math.max(...points.map((each) => Math.max(each.measured, each.predicted)), 1e-4);
  // A TPOT far above what steps take would press their line to the ground.
  const shown = tpot && tpot < 6 * peak;
  const most = 1.15 * (shown ? Math.max(tpot, peak) : peak);
  const [left, top, bottom] = [52, 4, height - 1];
  const x = (at) => left + (1 - (now - at) / span) * (width - left);
  const y = (value) => bottom - (value / most) * (bottom - top);
  const line = (key) => {
    let before = null;
    const parts = points.map((each) => {
      const joined = before !== null && each.at - before < 3.5;
      before = each.at;
      // A lone point is drawn as a dash as long as the second that it stands for.
      const from = joined ? "" : `M${round(x(each.at - 1))} ${round(y(each[key]))}`;
      return `${from}L${round(x(each.at))} ${round(y(each[key]))}`;
    });
    return parts.join("");
  };
  attributes(part(svg, "path", "frame"), { d: `M${left} ${bottom}H${width}M${left} ${top}V${bottom}` });
  attributes(part(svg, "path", "predicted"), { d: line("predicted") });
  attributes(part(svg, "path", "measured"), { d: line("measured") });
  attributes(part(svg, "path", "due"), { d: shown ? `M${left} ${y(tpot)}H${width}` : "" });
  label(svg, "most", left - 5, top + 10, seconds(most), "end");
  label(svg, "none", left - 5, bottom, "0", "end");
  const newest = points.at(-1);
  svg.setAttribute("aria-label", newest
    ? `Step time: ${seconds(newest.measured)} measured, ${seconds(newest.predicted)} predicted`
    : "No steps lately");
}

const sizes = new WeakMap();
const resized = new ResizeObserver((entries) => {
  for (const { target, contentRect: { width, height } } of entries) {
    if (!width) continue;
    sizes.set(target, { width, height });
    target.setAttribute("viewBox", `0 0 ${width} ${height}`);
  }
});

/** The size in which an SVG is shown, taken for its own units, so that text keeps its shape. It is
    observed rather than asked for: to ask would lay the page out anew for each drawing. */
export function area(svg) {
  if (!sizes.has(svg)) {
    const [width, height] = [svg.clientWidth || 300, svg.clientHeight || 120];
    sizes.set(svg, { width, height });
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    resized.observe(svg);
  }
  return sizes.get(svg);
}

export function label(svg, name, x, y, text, anchor = "start") {
  const node = part(svg, "text", name);
  attributes(node, { x, y, "text-anchor": anchor });
  say(node, text);
}

export const round = (value) => Math.round(10 * value) / 10;

export function rectangle(x, y, width, height) {
  return `M${round(x)} ${round(y)}h${round(width)}v${round(height)}h${-round(width)}z`;
}
