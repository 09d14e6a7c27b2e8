// Follows the server's snapshots, one a second, and shows them.

import { attainment, histogram, steps, sums } from "./charts.js";
import {
  ask, bound, byId, count, element, events, keepKey, later, percent, reason, say, seconds,
} from "./common.js";

const SPAN_S = 120;
const STALE_S = 4;
const LONGEST_WAIT_S = 10;

const ROLES = { prefill: "prefill", decode: "decode", both: "prefill and decode" };
const cards = new Map();
let newest = 0;
let before = null;

// The feed.

async function follow() {
  let wait = 1;
  for (;;) {
    await seen();
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
      state("lost", `${error.message}; trying again`);
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

// What is shown.

function show(told) {
  const begun = performance.now();
  newest = begun;
  if (told.closed) state("lost", told.closed);
  else state("live", "live");
  if (!told.model) return;
  tiles(told);
  queue(told.queued);
  running(told.running);
  slo(told);
  instances(told);
  before = told;
  const drawn = performance.now() - begun;
  say(byId("cost"), `Once a second: a snapshot in ${seconds(told.took_s)}, for all who look on; ` +
    `drawn in ${seconds(drawn / 1000)}. Requests are those of this router.`);
  document.documentElement.dataset.drawnMs = drawn.toFixed(2);
  document.dispatchEvent(new CustomEvent("snapshot", { detail: told }));
}

function tiles(told) {
  const { queued, running: run, slo: line, judged } = told;
  say(byId("model"), told.model);
  if (document.title !== told.model) document.title = told.model;
  say(byId("about"), `${told.policies.join(" + ")}, SLO: TTFT ${bound(line.ttft_s)}, ` +
    `TPOT ${bound(line.tpot_s)}`);
  const [all, ttft, tpot, both] = sums(judged.slots);
  say(byId("kept"), all ? percent(both / all) : "–");
  const minutes = (judged.slot_s * judged.slots.length) / 60;
  say(byId("kept-note"), all
    ? `TTFT ${percent(ttft / all)}, TPOT ${percent(tpot / all)} of ${count(all)} in ${minutes} min`
    : `nothing ended in ${minutes} min`);
  say(byId("queued"), count(queued.count));
  note("queued-note", queued.late, `${count(queued.late)} can't be in time`,
    queued.begun ? `${count(queued.begun)} in prefill`
      : queued.count ? "all can be in time" : "nothing waits");
  say(byId("running"), count(run.count));
  note("running-note", run.late, `${count(run.late)} behind the TPOT`,
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
  rows(byId("queue-rows"), told.rows, (row) => [
    row.name, row.state, count(row.prompt), seconds(row.waited_s), seconds(row.laxity_s), row.at,
  ], (row) => row.laxity_s < 0);
  rest("queue-rest", told, "Nothing is queued.");
}

function running(told) {
  histogram(byId("run-bars"), told, "Running requests by slack");
  rows(byId("run-rows"), told.rows, (row) => [
    row.name, row.state, `${count(row.tokens)}/${count(row.max_tokens)}`, seconds(row.tpot_s),
    seconds(row.slack_s), row.at,
  ], (row) => row.slack_s < 0);
  rest("run-rest", told, "Nothing runs.");
}

const WIDE = [2, 5];

/** A table's rows, in the nodes that are there. The fifth cell tells whether it is late. */
function rows(body, told, cells, late) {
  const wide = body.id === "run-rows" ? [3, 5] : WIDE;
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

function rest(id, { count: all, rows: told }, none) {
  const left = all - told.length;
  say(byId(id), left > 0 ? `and ${count(left)} more` : all ? "" : none);
}

function slo({ judged }) {
  attainment(byId("slo-chart"), judged.slots);
  say(byId("slo-from"), `${(judged.slot_s * judged.slots.length) / 60} min ago`);
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
  card.used = element("div", "meter", element("i"));
  card.parkedBar = element("div", "meter parked", element("i"));
  card.chart = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  card.chart.setAttribute("class", "chart low");
  card.chart.setAttribute("role", "img");
  node.append(
    element("header", "", element("h3", "", id), card.role), card.requests, card.used, card.kv,
    card.parkedBar, card.parkedKv, card.chart, card.step,
  );
  return card;
}

function drawInstance(card, { role, taking, queue_s, load, status }, told) {
  say(card.role, `${ROLES[role]}${taking ? "" : ", draining"}`);
  card.used.hidden = card.kv.hidden = card.step.hidden = !status;
  card.parkedBar.hidden = card.parkedKv.hidden = !(status?.parked_limit);
  if (!status) {
    say(card.requests, "it has not told of itself yet");
    return;
  }
  const pace = role === "decode" ? `load ${percent(load ?? 0)}` : `${seconds(queue_s)} of prompts`;
  say(card.requests, `${count(status.waiting)} waiting, ${count(status.running)} running, ` +
    `${count(status.parked)} parked; ${pace}`);
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
  const point = card.points.at(-1);
  const fresh = point && told.at - point.at < 3.5;
  say(card.step, fresh
    ? `step ${seconds(point.measured)}, predicted ${seconds(point.predicted)}` +
      `${tpot ? `, TPOT ${bound(tpot)}` : ""}; ${point.sequences.toFixed(1)} sequences`
    : "no steps at present");
}

function meter(node, share) {
  node.firstChild.style.setProperty("--share", Math.min(share, 1));
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

/** The mean step of the instances that decode, and how many tokens come of them. */
function stepTile(told) {
  const decoding = told.instances.filter((each) => each.role !== "prefill");
  const fresh = decoding
    .map((each) => cards.get(each.id).points.at(-1))
    .filter((point) => point?.at === told.at);
  const ran = fresh.reduce((total, point) => total + point.ran, 0);
  const took = fresh.reduce((total, point) => total + point.ran * point.measured, 0);
  say(byId("step"), ran ? seconds(took / ran) : "–");
  byId("step").classList.toggle("late", ran > 0 && took / ran > told.slo.tpot_s);
  const span = before ? told.at - before.at : 0;
  const made = span > 0 ? (told.tokens - before.tokens) / span : 0;
  say(byId("step-note"), `decode, ${count(Math.max(made, 0))} tokens/s`);
}

setInterval(() => {
  const old = (performance.now() - newest) / 1000;
  if (newest && old > STALE_S && byId("state").dataset.state === "live") {
    state("lost", `no news for ${old.toFixed(0)} s`);
  }
}, 1000);

follow();
