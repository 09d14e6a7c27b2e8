// Sends one prompt and shows its way through the server: queue, prefill, transfer, and each token
// against the line of its TPOT.

import { area, label, rectangle, round } from "./charts.js";
import { ask, attributes, bound, byId, events, part, reason, say, seconds } from "./common.js";

const REDRAW_MS = 100;

/** The request that was sent last. Times are seconds since it was sent. */
let run = null;
let slo = null;
let textual = true;

document.addEventListener("snapshot", ({ detail }) => {
  if (!slo) first(detail);
  slo = detail.slo;
  if (run && !run.ended) {
    const { queued, running } = detail;
    const own = [queued, running].flatMap((each) => [...each.rows, ...each.lost.rows])
      .find((row) => row.name === run.id);
    if (own) learn(own);
  }
});

/** What the fields begin with. */
function first({ text, chat, max_tokens, slo: line }) {
  textual = text;
  const kind = byId("kind");
  for (const option of kind.options) {
    option.disabled = { chat: !chat, text: !text }[option.value] ?? false;
  }
  kind.value = chat ? "chat" : text ? "text" : "ids";
  if (!text) byId("prompt").value = "1 2 3";
  byId("max-tokens").max = max_tokens;
  if (byId("max-tokens").valueAsNumber > max_tokens) byId("max-tokens").value = max_tokens;
  byId("ttft").placeholder = `${1000 * line.ttft_s}`;
  byId("tpot").placeholder = `${1000 * line.tpot_s}`;
}

/** What the server tells of it while it runs. */
function learn(own) {
  run.stage = own.state;
  if (own.queue_s !== undefined) run.timing = own;
}

byId("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("ask").requestSubmit();
});
byId("stop").addEventListener("click", () => run?.stop.abort());

async function send() {
  if (run && !run.ended) return;
  const kind = byId("kind").value;
  const number = (id) => byId(id).valueAsNumber;
  const body = {
    ...prompt(kind, byId("prompt").value),
    max_tokens: number("max-tokens"), temperature: number("temperature"),
    stream: true, timing: true, return_token_ids: true, slo: {},
  };
  const due = { ttft: slo?.ttft_s ?? 1, tpot: slo?.tpot_s ?? 0.1 };
  for (const name of ["ttft", "tpot"]) {
    if (Number.isNaN(number(name))) continue;
    body.slo[`${name}_ms`] = number(name);
    due[name] = number(name) / 1000;
  }
  run = {
    id: `live-${crypto.getRandomValues(new Uint32Array(1))[0].toString(16)}`, due,
    sent: performance.now(), tokens: [], stage: "sent", timing: null, why: "", ended: false,
    stop: new AbortController(),
  };
  document.body.dataset.own = run.id;
  begin();
  const redraw = setInterval(draw, REDRAW_MS);
  try {
    await read(kind === "chat" ? "v1/chat/completions" : "v1/completions", body);
  } catch (error) {
    if (run.stop.signal.aborted) run.why = "stopped";
    else refuse(error.message);
  } finally {
    run.ended = true;
    run.took = since();
    clearInterval(redraw);
    draw();
    end();
  }
}

function prompt(kind, text) {
  if (kind === "chat") return { messages: [{ role: "user", content: text }] };
  return { prompt: kind === "ids" ? (text.match(/\d+/g) ?? []).map(Number) : text };
}

function begin() {
  byId("run").dataset.begun = "yes";
  byId("refusal").hidden = true;
  say(byId("answer"), "");
  say(byId("outcome"), "");
  byId("send").disabled = true;
  byId("stop").disabled = false;
}

function refuse(why) {
  byId("refusal").hidden = false;
  say(byId("refusal"), why);
  if (!run.tokens.length) byId("run").dataset.begun = "no";
}

async function read(path, body) {
  const response = await ask(path, {
    method: "POST", signal: run.stop.signal, body: JSON.stringify(body),
    headers: { "Content-Type": "application/json", "X-Request-ID": run.id },
  });
  if (!response.ok) throw new Error(await reason(response));
  for await (const data of events(response)) {
    if (data === "[DONE]") break;
    const { choices, error } = JSON.parse(data);
    if (error) throw new Error(error.message);
    if (choices.length) take(choices[0]);
  }
}

/** An event may hold several tokens, or the role alone. */
function take(choice) {
  const at = since();
  const ids = choice.token_ids ?? [];
  for (const id of ids) run.tokens.push({ id, at });
  const text = textual ? choice.text ?? choice.delta?.content ?? "" : ids.map((id) => `${id} `).join("");
  if (text) byId("answer").append(text);
  if (choice.timing) run.timing = choice.timing;
  if (choice.finish_reason) run.why = choice.finish_reason;
}

const since = () => (performance.now() - run.sent) / 1000;

/** When a token is due: the first by the TTFT, each further one by the line from the first. */
function dueAt(index) {
  return index ? run.tokens[0].at + index * run.due.tpot : run.due.ttft;
}

// The timeline: time to the right, tokens upwards.

const LEFT = 46;
const STRIP = { top: 20, height: 14 };

function draw() {
  const svg = byId("timeline");
  const { width, height } = area(svg);
  const now = run.ended ? run.took : since();
  const made = run.tokens.length;
  const span = 1.06 * Math.max(now, made ? Math.min(dueAt(made - 1), 2 * now) : 0, 0.05);
  const scale = { x: (at) => LEFT + (at / span) * (width - LEFT - 8) };
  phases(svg, scale, now);
  tokens(svg, scale, { width, height, span, made });
}

/** The strip on top: what the time before the tokens, and the KV's transfer, were spent on. */
function phases(svg, { x }, now) {
  const bar = (name, from, to) => {
    const d = to > from ? rectangle(x(from), STRIP.top, x(to) - x(from), STRIP.height) : "";
    attributes(part(svg, "path", name), { d });
  };
  const { timing, tokens: made } = run;
  // By the server's times; its first token may be told of a little later than it was there.
  const queued = timing ? timing.queue_s : 0;
  const ready = timing ? timing.queue_s + timing.prefill_s : 0;
  bar("unknown", 0, timing ? 0 : made.length ? made[0].at : now);
  bar("queue", 0, queued);
  bar("prefill", queued, ready);
  bar("transfer", ready, ready + (timing?.transfer_s ?? 0));
  const due = run.due.ttft;
  const inside = due <= now;
  attributes(part(svg, "path", "due ttft"), {
    d: inside ? `M${round(x(due))} ${STRIP.top - 5}v${STRIP.height + 10}` : "",
  });
  const first = made.length ? `first token ${seconds(made[0].at)}` : stage();
  label(svg, "first", LEFT, STRIP.top - 7, `${first}, due ${bound(due)}`);
}

function stage() {
  return { queued: "queued", prefill: "in prefill" }[run.stage] ?? "waiting";
}

function tokens(svg, { x }, { width, height, span, made }) {
  const [top, bottom] = [STRIP.top + STRIP.height + 10, height - 20];
  const most = Math.max(made, 8);
  const y = (number) => bottom - (number / most) * (bottom - top);
  const dots = { met: [], missed: [] };
  let line = "";
  run.tokens.forEach(({ at }, index) => {
    const kept = at <= dueAt(index);
    dots[kept ? "met" : "missed"].push(`M${round(x(at))} ${round(y(index + 1))}h.01`);
  });
  if (made) {
    const from = run.tokens[0].at;
    const last = Math.min(most - 1, (span - from) / run.due.tpot);
    line = `M${round(x(from))} ${round(y(1))}L${round(x(from + last * run.due.tpot))} ` +
      `${round(y(1 + last))}`;
  }
  attributes(part(svg, "path", "frame"), { d: `M${LEFT} ${top}V${bottom}H${width - 8}` });
  attributes(part(svg, "path", "due tpot"), { d: line });
  for (const kind of ["met", "missed"]) {
    attributes(part(svg, "path", `dots ${kind}`), { d: dots[kind].join("") });
  }
  label(svg, "most", LEFT - 6, top + 9, `${most}`, "end");
  label(svg, "unit", LEFT - 6, bottom, "tokens", "end");
  label(svg, "start", LEFT, height - 5, "sent");
  label(svg, "finish", width - 8, height - 5, seconds(span), "end");
  svg.setAttribute("aria-label", made ? summary() : "No token yet");
}

function summary() {
  const made = run.tokens.length;
  const late = run.tokens.filter(({ at }, index) => at > dueAt(index)).length;
  const mean = made > 1 ? (run.tokens[made - 1].at - run.tokens[0].at) / (made - 1) : null;
  const parts = [`first token ${seconds(run.tokens[0].at)} of ${bound(run.due.ttft)}`];
  if (mean !== null) parts.push(`TPOT ${seconds(mean)} of ${bound(run.due.tpot)}`);
  parts.push(`${made} tokens, ${late || "none"} late`);
  return parts.join("; ");
}

function end() {
  byId("send").disabled = false;
  byId("stop").disabled = true;
  delete document.body.dataset.own;
  if (!run.tokens.length) return;
  const { timing } = run;
  const spent = ["queue", "prefill", "transfer"]
    .filter((name) => Number.isFinite(timing?.[`${name}_s`]))
    .map((name) => `${name} ${seconds(timing[`${name}_s`])}`);
  const parts = [spent.join(", "), summary(), `ended by ${run.why}`];
  say(byId("outcome"), `${parts.filter(Boolean).join("; ")}.`);
}
