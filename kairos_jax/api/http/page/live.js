// Follows the server's snapshots, one a second, and shows them.

import { attainment, histogram, rate, rates, steps, sums } from "./charts.js";
import {
  ask, bound, byId, count, element, events, keepKey, later, percent, reason, say, seconds,
} from "./common.js";
import { term } from "./tips.js";

const SPAN_S = 120;
const STALE_S = 4;
// Of an instance's steps: workers in other processes tell of theirs every few seconds.
const FRESH_S = 3.5;
const LONGEST_WAIT_S = 10;

const ROLES = { prefill: "prefill", decode: "decode", both: "prefill and decode" };
const cards = new Map();
/** When the newest snapshot came: on the page's clock in ms, and as a date. */
let newest = 0;
let newestAt = null;
/** Since when the server is gone, in ms on the page's clock. */
let goneFrom = null;
let before = null;

// The feed.

async function follow() {
  let wait = 1;
  for (;;) {
    await seen();
    newest &&= performance.now(); // no news came while nobody looked
    const stop = new AbortController();
    const hide = () => document.hidden && stop.abort();
    document.addEventListener("visibilitychange", hide);
    try {
      const response = await ask("live", { signal: stop.signal });
      if (response.status === 401) {
        await askForKey(await reason(response));
        continue;
      }
      if (!response.ok) throw new Error(await reason(response));
      byId("key-form").hidden = true;
      for await (const data of events(response)) {
        wait = 1;
        show(JSON.parse(data));
      }
      throw new Error("the connection has ended");
    } catch (error) {
      if (stop.signal.aborted) continue;
      gone(error.message);
    } finally {
      document.removeEventListener("visibilitychange", hide);
      stop.abort();
    }
    await later(1000 * wait);
    wait = Math.min(2 * wait, LONGEST_WAIT_S);
  }
}

/** Returns when the page is looked at: a hidden one need not be kept up to date. */
function seen() {
  if (!document.hidden) return Promise.resolve();
  return new Promise((resolve) => {
    document.addEventListener("visibilitychange", resolve, { once: true });
  });
}

function askForKey(why) {
  state("wait", "a key is needed");
  const form = byId("key-form");
  say(byId("key-why"), why);
  form.hidden = false;
  return new Promise((resolve) => {
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      keepKey(byId("key").value);
      resolve();
    }, { once: true });
  });
}

function state(kind, text) {
  const node = byId("state");
  node.dataset.state = kind;
  say(node, text);
}

/** What is shown is old: the page dims, and says since when. */
function gone(why) {
  state("lost", "no connection");
  if (goneFrom !== null) return;
  goneFrom = newest || performance.now();
  document.body.dataset.gone = "";
  byId("gone").hidden = false;
  const since = (newestAt ?? new Date()).toLocaleTimeString();
  say(byId("gone-since"), `No news from the server since ${since}: ${why}.`);
  tellGone();
}

/** Every second, and so not to be read aloud. */
function tellGone() {
  const old = Math.round((performance.now() - goneFrom) / 1000);
  say(byId("gone-for"), ` ${old < 100 ? `${old}\u00a0s` : seconds(old)} ago; trying again.`);
}

function back() {
  goneFrom = null;
  delete document.body.dataset.gone;
  byId("gone").hidden = true;
}

// What is shown.

function show(told) {
  const begun = performance.now();
  newest = begun;
  newestAt = new Date();
  if (goneFrom !== null) back();
  if (told.closed) state("lost", told.closed);
  else state("live", "live");
  if (!told.model) return;
  if (before && told.at < before.at) forget();
  tiles(told);
  queue(told.queued);
  running(told.running);
  slo(told);
  flow(told);
  instances(told);
  before = told;
  const drawn = performance.now() - begun;
  say(byId("cost"), `Once a second: a snapshot in ${seconds(told.took_s)}, for all who look on; ` +
    `drawn in ${seconds(drawn / 1000)}. Requests are those of this router.`);
  document.documentElement.dataset.drawnMs = drawn.toFixed(2);
  document.dispatchEvent(new CustomEvent("snapshot", { detail: told }));
}

/** Another server answers: its counts begin anew. */
function forget() {
  before = null;
  for (const card of cards.values()) card.node.remove();
  cards.clear();
}

function tiles(told) {
  const { queued, running: run, slo: line, judged } = told;
  say(byId("model"), told.model);
  if (document.title !== told.model) document.title = told.model;
  say(byId("about"), `${told.policies.join(" + ")}, SLO: TTFT ${bound(line.ttft_s)}, ` +
    `TPOT ${bound(line.tpot_s)}`);
  const [ended, ttft, tpot, both] = sums(judged.slots);
  const missed = judged.lost;
  // Of those that ended, and of those in progress whose SLO is lost already.
  const share = (kept, lost) => (ended + lost ? percent(kept / (ended + lost)) : "–");
  say(byId("kept"), share(both, missed.both));
  say(byId("kept-note"), ended + missed.both
    ? `TTFT ${share(ttft, missed.ttft)}, TPOT ${share(tpot, missed.tpot)}; ` +
      `${count(ended)} ended in ${span(judged)}, ${count(missed.both)} in progress are lost`
    : `nothing ended in ${span(judged)}`);
  say(byId("queued"), count(queued.count));
  note("queued-note", queued.lost.count, `${count(queued.lost.count)} can't be in time`,
    queued.begun ? `${count(queued.begun)} in prefill`
      : queued.count ? "all can be in time" : "nothing waits");
  say(byId("running"), count(run.count));
  const behind = run.late ? `${count(run.late)} behind the TPOT` : "";
  const lost = run.lost.count ? `${count(run.lost.count)} lost` : "";
  note("running-note", run.late || run.lost.count, [behind, lost].filter(Boolean).join(", "),
    run.count ? "all ahead of the TPOT" : "nothing runs");
  pages(told.instances);
}

function note(id, late, bad, good) {
  say(byId(id), late ? bad : good);
  byId(id).classList.toggle("late", late > 0);
}

function pages(all) {
  const known = all.filter((each) => each.status);
  const sum = (name) => known.reduce((total, each) => total + each.status[name], 0);
  const [used, most] = [sum("used_pages"), sum("num_pages")];
  say(byId("pages"), most ? percent(used / most) : "–");
  say(byId("pages-note"), `${count(used)} of ${count(most)} used`);
}

function queue(told) {
  histogram(byId("queue-bars"), told, "Queued requests by laxity");
  const cells = (row) => [
    row.name, row.state, count(row.prompt), seconds(row.waited_s), seconds(row.laxity_s), row.at,
  ];
  const none = told.count ? "None can be in time." : "Nothing is queued.";
  both("queue", told, cells, (row) => row.laxity_s < 0, none);
}

function running(told) {
  histogram(byId("run-bars"), told, "Running requests by slack");
  const cells = (row) => [
    row.name, row.missed ? row.missed.join(", ") : row.state,
    `${count(row.tokens)}/${count(row.max_tokens)}`, seconds(row.tpot_s), seconds(row.slack_s),
    row.at,
  ];
  const none = told.count ? "None can keep its SLO." : "Nothing runs.";
  both("run", told, cells, (row) => row.slack_s < 0, none);
}

/** The table of those that can keep their SLO, and the table of the lost, if there are any. */
function both(name, { count: all, rows: first, lost }, cells, late, none) {
  rows(byId(`${name}-rows`), first, cells, late);
  rest(`${name}-rest`, all - lost.count, first.length, none);
  byId(`${name}-lost`).hidden = !lost.count;
  rows(byId(`${name}-lost-rows`), lost.rows, cells, late);
  rest(`${name}-lost-rest`, lost.count, lost.rows.length, "");
}

const WIDE = { queue: [2, 5], run: [3, 5] };

/** A table's rows, in the nodes that are there. The fifth cell tells whether it is late. */
function rows(body, told, cells, late) {
  const wide = WIDE[body.id.split("-")[0]];
  while (body.children.length > told.length) body.lastChild.remove();
  while (body.children.length < told.length) {
    const row = element("tr");
    for (let index = 0; index < 6; index += 1) {
      row.append(element("td", wide.includes(index) ? "wide" : ""));
    }
    body.append(row);
  }
  told.forEach((each, index) => {
    const row = body.children[index];
    cells(each).forEach((text, place) => say(row.children[place], text));
    row.children[0].title = each.name;
    row.children[4].classList.toggle("late", late(each));
    row.classList.toggle("own", each.name === document.body.dataset.own);
  });
}

function rest(id, all, told, none) {
  const left = all - told;
  say(byId(id), left > 0 ? `and ${count(left)} more` : all ? "" : none);
}

function slo({ judged }) {
  attainment(byId("slo-chart"), judged.slots);
  say(byId("slo-unit"), `requests that ended, in each ${bound(judged.slot_s)}`);
  say(byId("slo-from"), `${span(judged)} ago`);
}

/** The time that all slots cover. */
const span = ({ slot_s, slots }) => `${(slot_s * slots.length) / 60}\u00a0min`;

function flow({ flow: told }) {
  const mean = `means of ${bound(told.slot_s)}`;
  const [taken, ended] = rates(byId("requests-chart"), told, { taken: 0, ended: 1 });
  say(byId("requests-now"), `${rate(taken)} taken, ${rate(ended)} ended; ${mean}`);
  const [tokens] = rates(byId("tokens-chart"), told, { tokens: 2 });
  say(byId("tokens-now"), `${rate(tokens)}; ${mean}`);
  for (const name of ["requests-from", "tokens-from"]) say(byId(name), `${span(told)} ago`);
}

// The instances.

function instances(told) {
  const grid = byId("instances");
  const ids = new Set(told.instances.map((each) => each.id));
  for (const [id, card] of cards) {
    if (!ids.has(id)) {
      card.node.remove();
      cards.delete(id);
    }
  }
  told.instances.forEach((each, index) => {
    if (!cards.has(each.id)) cards.set(each.id, newCard(each.id));
    const card = cards.get(each.id);
    const there = grid.children[index] ?? null;
    if (there !== card.node) grid.insertBefore(card.node, there);
    drawInstance(card, each, told);
    // The focus stops at the terms of one card: those of 64 would be too many to pass.
    for (const node of card.terms) node.tabIndex = index ? -1 : 0;
  });
  const left = told.num_instances - told.instances.length;
  say(byId("instances-rest"), left > 0 ? `and ${count(left)} more` : "");
  stepTile(told);
}

function newCard(id) {
  const node = element("article", "card instance");
  const names = ["role", "requests", "kv", "parkedKv", "step"];
  const card = { node, points: [], last: null };
  for (const name of names) card[name] = element(name === "role" ? "span" : "p");
  card.numbers = ["waiting", "running", "parked", "load"].map((name) => [name, element("span")]);
  card.terms = card.numbers.map(([name]) => term(name));
  const counts = card.numbers.map(([, number], index) => (
    element("span", "", number, "\u00a0", card.terms[index])));
  card.load = counts.pop();
  card.prompts = element("span");
  const [waiting, running, parked] = counts;
  card.requests.append(waiting, ", ", running, ", ", parked, "; ", card.load, card.prompts);
  card.silent = element("p", "", "it has not told of itself yet");
  card.used = element("div", "meter", element("i"));
  card.parkedBar = element("div", "meter parked", element("i"));
  card.chart = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  card.chart.setAttribute("class", "chart low");
  card.chart.setAttribute("role", "img");
  node.append(
    element("header", "", element("h3", "", id), card.role), card.silent, card.requests, card.used,
    card.kv, card.parkedBar, card.parkedKv, card.chart, card.step,
  );
  return card;
}

function drawInstance(card, { role, taking, queue_s, load, status }, told) {
  say(card.role, `${ROLES[role]}${taking ? "" : ", draining"}`);
  card.requests.hidden = card.used.hidden = card.kv.hidden = card.step.hidden = !status;
  card.silent.hidden = Boolean(status);
  card.parkedBar.hidden = card.parkedKv.hidden = !(status?.parked_limit);
  if (!status) return;
  card.load.hidden = role === "prefill";
  for (const [name, number] of card.numbers) {
    say(number, name === "load" ? percent(load ?? 0) : count(status[name]));
  }
  say(card.prompts, role === "decode" ? "" : `${seconds(queue_s)} of prompts`);
  const free = status.num_pages - status.used_pages;
  meter(card.used, status.used_pages / status.num_pages);
  say(card.kv, `KV pages: ${count(status.used_pages)} used, ${count(free)} free`);
  if (status.parked_limit) {
    meter(card.parkedBar, status.parked_tokens / status.parked_limit);
    say(card.parkedKv, `parked outside of the pool: ${count(status.parked_tokens)} of ` +
      `${count(status.parked_limit)} tokens`);
  }
  noteSteps(card, status, told.at);
  const tpot = role === "prefill" ? null : told.slo.tpot_s;
  card.chart.toggleAttribute("hidden", !card.points.length);
  if (card.points.length) steps(card.chart, card.points, told.at, SPAN_S, tpot);
  const point = freshStep(card, told.at);
  say(card.step, point
    ? `step ${seconds(point.measured)}, predicted ${seconds(point.predicted)}` +
      `${tpot ? `, TPOT ${bound(tpot)}` : ""}; ${point.sequences.toFixed(1)} sequences`
    : "no steps at present");
}

function meter(node, share) {
  node.firstChild.style.setProperty("--share", Math.min(share, 1));
}

/** The newest mean step of an instance, unless it is too old to be of the present. */
function freshStep({ points }, now) {
  const point = points.at(-1);
  return point && now - point.at < FRESH_S ? point : null;
}

/** What the steps since the last snapshot took on average. */
function noteSteps(card, status, at) {
  const { last } = card;
  const ran = last ? status.steps - last.steps : 0;
  if (ran > 0) {
    const mean = (name) => (status[name] - last[name]) / ran;
    const [measured, predicted] = [mean("measured_s"), mean("predicted_s")];
    card.points.push({ at, ran, measured, predicted, sequences: mean("sequences") });
  }
  card.last = status;
  while (card.points.length && at - card.points[0].at > SPAN_S) card.points.shift();
}

/** The mean of the steps that the cards of the instances that decode show, and how many tokens come
    of them. */
function stepTile(told) {
  const shown = told.instances
    .filter((each) => each.role !== "prefill")
    .map((each) => freshStep(cards.get(each.id), told.at))
    .filter(Boolean);
  const ran = shown.reduce((total, point) => total + point.ran, 0);
  const took = shown.reduce((total, point) => total + point.ran * point.measured, 0);
  say(byId("step"), ran ? seconds(took / ran) : "–");
  byId("step").classList.toggle("late", ran > 0 && took / ran > told.slo.tpot_s);
  const span = before ? told.at - before.at : 0;
  const made = span > 0 ? (told.tokens - before.tokens) / span : 0;
  const of = shown.length > 1 ? `mean of ${shown.length} instances, ` : "";
  say(byId("step-note"), `${of}${count(Math.max(made, 0))} tokens/s`);
}

setInterval(() => {
  const old = (performance.now() - newest) / 1000;
  if (goneFrom !== null) tellGone();
  else if (newest && !document.hidden && old > STALE_S) gone("it sends no more snapshots");
}, 1000);

// On a phone the prompt comes right after the figures, and in that order in the document too, so
// that the focus goes the same way.
const narrow = window.matchMedia("(max-width: 560px)");

function place() {
  const focused = document.activeElement;
  if (narrow.matches) byId("tiles").after(byId("try"));
  else document.querySelector("main").append(byId("try"));
  focused?.focus({ preventScroll: true });
}

narrow.addEventListener("change", place);
place();
follow();
