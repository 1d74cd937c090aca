"use strict";

const EVERY = 2; // seconds between scrapes
const KEPT = 150; // of them

const count = (value) => String(Math.round(value * 10) / 10);
const share = (value) => `${(100 * value).toFixed(1)} %`;
const time = (value) => (value < 1 ? `${(1000 * value).toFixed(value < 0.1 ? 1 : 0)} ms` : `${value.toFixed(2)} s`);
const spread = (name) => ({ "50 %": quantile(name, 0.5), "90 %": quantile(name, 0.9), "99 %": quantile(name, 0.99) });

// `lines` {label: figure of the scrapes} are drawn; `rows` gives [label, value] that are not.
const PANELS = [
  { title: "Sequences", show: count, lines: { running: gauge("thalweg_num_requests_running"), waiting: gauge("thalweg_num_requests_waiting") } },
  { title: "Tokens per second", show: count, lines: { generated: rate("thalweg_generation_tokens_total"), "of prompts": rate("thalweg_prompt_tokens_total") } },
  { title: "Time to first token", show: time, lines: spread("thalweg_time_to_first_token_seconds") },
  { title: "Time between tokens", show: time, lines: spread("thalweg_inter_token_latency_seconds") },
  { title: "Time of a whole request", show: time, lines: spread("thalweg_e2e_request_latency_seconds") },
  { title: "Paged cache in use", show: share, lines: { blocks: gauge("thalweg_kv_cache_usage_perc") } },
  { title: "State slots", show: count, lines: { "in use": gauge("thalweg_state_slots_used"), all: gauge("thalweg_state_slots_total") } },
  { title: "Prompt tokens from the prefix cache", show: share, lines: { "of those looked up": ratio("thalweg_prefix_cache_hits_total", "thalweg_prefix_cache_queries_total") } },
  { title: "Sequences by their end", show: count, rows: by("thalweg_request_success_total", "finished_reason") },
  { title: "Rejected requests", show: count, rows: by("thalweg_requests_rejected_total", "reason") },
  { title: "Requests that were wrong", show: count, rows: by("thalweg_request_refused_total", "reason") },
];

const scrapes = [];

function node(kind, parent, className = "", text = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = text;
  parent.append(made);
  return made;
}

function svg(kind, parent, attributes) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

class Panel {
  constructor({ title, show, lines = {}, rows }) {
    this.show = show;
    this.rows = rows;
    const box = node("section", $("panels"), "panel");
    box.setAttribute("aria-label", title);
    node("h2", box, "", title);
    const labels = Object.keys(lines);
    const chart = labels.length ? svg("svg", box, { viewBox: `0 0 ${KEPT - 1} 100`, preserveAspectRatio: "none", "aria-hidden": "true" }) : null;
    this.body = node("tbody", node("table", box));
    this.lines = labels.map((label, i) => {
      const row = node("tr", this.body), key = node("td", row, "key");
      key.setAttribute("aria-hidden", "true");
      svg("polyline", svg("svg", key, { viewBox: "0 0 20 6" }), { points: "0,3 20,3", class: `line${i}` });
      node("th", row, "", label).scope = "row";
      return { figure: lines[label], values: [], cell: node("td", row), line: svg("polyline", chart, { class: `line${i}` }) };
    });
  }

  update() {
    for (const line of this.lines) {
      const value = line.figure(scrapes);
      line.values = [...line.values, value].slice(-KEPT);
      line.cell.textContent = value === null ? "none yet" : this.show(value);
    }
    const most = Math.max(...this.lines.flatMap((line) => line.values), 1e-9);
    for (const { values, line } of this.lines)
      line.setAttribute("points", values.map((v, i) => [KEPT - values.length + i, v]).filter(([, v]) => v !== null)
        .map(([x, v]) => `${x},${97 - (94 * v) / most}`).join(" "));
    if (!this.rows) return;
    this.body.replaceChildren();
    for (const [label, value] of this.rows(scrapes)) {
      const row = node("tr", this.body);
      node("th", row, "", label.replaceAll("_", " ")).scope = "row";
      node("td", row, "", this.show(value));
    }
  }
}

const panels = PANELS.map((panel) => new Panel(panel));

async function scrape() {
  if (document.hidden && scrapes.length) return; // nobody looks
  try {
    const response = await fetch("metrics");
    if (!response.ok) throw new Error(`${response.status} ${response.statusText}`);
    scrapes.push({ at: performance.now() / 1000, values: parse(await response.text()) });
    if (scrapes.length > KEPT) scrapes.shift();
    for (const panel of panels) panel.update();
    $("status").textContent = "";
    if ($("model").textContent === "") {
      const models = await fetch("v1/models");
      if (models.ok) $("model").textContent = (await models.json()).data[0].id;
    }
  } catch (error) {
    $("status").textContent = `No figures: ${error.message}; trying again`;
  }
}

async function watch() {
  await scrape();
  setTimeout(watch, 1000 * EVERY);
}

watch();
