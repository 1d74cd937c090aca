"use strict";

const $ = (id) => document.getElementById(id);
let messages = []; // what the model is sent, without the system message
let running = null; // AbortController of the answer under way
let model = null;

function theme(name) {
  document.documentElement.dataset.theme = name;
  try { localStorage.setItem("theme", name); } catch { /* storage may be off */ }
}

function storedTheme() {
  try { return localStorage.getItem("theme"); } catch { return null; }
}

function element(kind, className, parent, text = "") {
  const found = document.createElement(kind);
  found.className = className;
  found.textContent = text; // never HTML: the model's words are text
  parent.append(found);
  return found;
}

function show(role, text) {
  const box = element("div", `message ${role}`, $("log"));
  const shown = { box, text: element("div", "text", box, text) };
  $("log").scrollTop = $("log").scrollHeight;
  return shown;
}

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function body() {
  const system = $("system").value.trim();
  return {
    model,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    stream: true,
    stream_options: { include_usage: true },
  };
}

// The server's events, each the JSON after "data: ".
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (!part.startsWith("data: ")) continue;
      const data = part.slice(6);
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function problem(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `${response.status} ${response.statusText}`;
  }
}

async function answer() {
  const conversation = messages; // "New chat" takes another
  const shown = show("assistant", "");
  const began = performance.now();
  let first = null, usage = null, reason = null, text = "", thought = null;
  running = new AbortController();
  busy(true);
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify(body()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      reason = choice.finish_reason ?? reason;
      const { content, reasoning_content: thinking } = choice.delta;
      if (content || thinking) first ??= performance.now();
      const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
      if (thinking) {
        if (thought === null) {
          const details = document.createElement("details");
          details.open = true;
          element("summary", "", details, "Thoughts");
          thought = element("div", "thought", details);
          shown.box.prepend(details);
        }
        thought.textContent += thinking;
      }
      if (content) {
        text += content;
        shown.text.textContent = text;
      }
      if (atEnd) log.scrollTop = log.scrollHeight;
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else element("div", "error", shown.box, error.message);
  }
  const ended = performance.now();
  running = null;
  busy(false);
  if (text) conversation.push({ role: "assistant", content: text });
  const facts = [];
  if (first !== null) facts.push(`first token ${Math.round(first - began)} ms`);
  if (usage && first !== null && usage.completion_tokens > 1)
    facts.push(`${usage.completion_tokens} tokens`,
      `${((usage.completion_tokens - 1) / ((ended - first) / 1000)).toFixed(1)} tokens/s`);
  if (reason === "length") facts.push("cut at the token limit");
  if (reason === "stopped") facts.push("stopped");
  element("div", "facts", shown.box, facts.join(" · "));
  $("log").scrollTop = $("log").scrollHeight;
}

function busy(yes) {
  $("send").hidden = yes;
  $("stop").hidden = !yes;
}

async function connect() {
  try {
    const response = await fetch("v1/models");
    if (!response.ok) throw new Error(await problem(response));
    model = (await response.json()).data[0].id;
    $("model").textContent = model;
    $("status").textContent = "";
  } catch (error) {
    $("status").textContent = `${error.message}; trying again`;
    setTimeout(connect, 2000);
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running || model === null) return;
  $("prompt").value = "";
  messages.push({ role: "user", content: text });
  show("user", text);
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  $("log").replaceChildren();
  $("prompt").focus();
});
$("theme").addEventListener("click", () => theme(document.documentElement.dataset.theme === "dark" ? "light" : "dark"));
theme(storedTheme() ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
connect();
