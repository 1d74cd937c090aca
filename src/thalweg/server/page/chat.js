"use strict";

let messages = []; // what the model is sent, without the system message
let running = null; // AbortController of the answer under way
const boxes = new Map(); // {message: its box}; an answer that failed has one, too, and is none of the messages

function number(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

// The tools' field as JSON. Throws what is wrong with it.
function tools() {
  const text = $("tools").value.trim();
  if (text === "") return undefined;
  let list;
  try { list = JSON.parse(text); } catch (error) { throw new Error(`Tools are no JSON: ${error.message}`); }
  if (!Array.isArray(list)) throw new Error("Tools are no list; expected [{\"type\": \"function\", …}]");
  return list;
}

function body() {
  const system = $("system").value.trim();
  return {
    model: $("model").value,
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    temperature: number("temperature"),
    top_p: number("top_p"),
    max_tokens: number("max_tokens"),
    seed: number("seed"),
    tools: tools(),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function answer() {
  const conversation = messages; // "New chat" takes another
  const shown = new Answer();
  const began = performance.now();
  let first = null, usage = null, reason = null, text = "", thought = "";
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
      const { content, reasoning_content: thinking, tool_calls: calls } = choice.delta;
      if (content || thinking || calls) first ??= performance.now();
      if (thinking) shown.think(thinking);
      if (content) shown.write(content);
      if (calls) shown.call(calls);
      thought += thinking ?? "";
      text += content ?? "";
    }
  } catch (error) {
    if (error.name === "AbortError") reason = "stopped";
    else shown.fail(error.message);
  }
  const seconds = (performance.now() - first) / 1000;
  running = null;
  busy(false);
  const message = { role: "assistant", content: text };
  const calls = reason === "tool_calls" ? shown.calls : []; // what was cut off is none
  if (thought) message.reasoning_content = thought;
  if (calls.length) message.tool_calls = calls;
  if (text || thought || calls.length) conversation.push(message);
  const facts = first === null ? [] : [`first token ${Math.round(first - began)} ms`];
  if (first !== null && usage?.completion_tokens > 1)
    facts.push(`${usage.completion_tokens} tokens`, `${((usage.completion_tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (reason === "length") facts.push("cut at the token limit");
  if (reason === "stopped") facts.push("stopped");
  shown.end(facts);
  if (conversation !== messages) return;
  boxes.set(message, shown.box);
  $("status").textContent = reason === "stopped" ? "Stopped" : reason === null ? "The answer failed" : "The answer is complete";
  if (calls.length) shown.askResults((results) => {
    calls.forEach((call, i) => add({ role: "tool", tool_call_id: call.id, content: results[i] }, toolMessage));
    answer();
  });
}

function add(message, view) {
  messages.push(message);
  boxes.set(message, view(message));
  $("log").scrollTop = $("log").scrollHeight;
}

// Takes back a message's box and all that follows it.
function takeBack(box) {
  const later = [...$("log").children];
  for (const gone of later.slice(later.indexOf(box))) {
    const message = [...boxes.keys()].find((key) => boxes.get(key) === gone);
    messages = messages.filter((kept) => kept !== message);
    boxes.delete(message);
    gone.remove();
  }
}

function busy(yes) {
  const focused = document.activeElement;
  $("send").hidden = yes;
  $("stop").hidden = !yes;
  if (focused === $("send") || focused === $("stop")) (yes ? $("stop") : $("prompt")).focus();
  if (yes) $("status").textContent = "Answering…";
  $("log").classList.toggle("busy", yes); // no retries meanwhile
}

async function connect() {
  try {
    const names = (await json("v1/models")).data.map((model) => model.id);
    $("model").replaceChildren();
    for (const name of names) element("option", "", $("model"), name);
    $("model").disabled = names.length < 2;
    $("status").textContent = "";
  } catch (error) {
    $("status").textContent = `${error.message}; trying again`;
    setTimeout(connect, 2000);
  }
}

async function act(box, pressed) {
  const message = [...boxes.keys()].find((key) => boxes.get(key) === box);
  if (pressed.classList.contains("copy")) {
    const code = pressed.closest(".code")?.querySelector("pre");
    await copyText(code ? code.textContent : message.content);
    $("status").textContent = "Copied";
  } else if (running) {
    return;
  } else if (pressed.classList.contains("retry")) {
    takeBack(box);
    $("prompt").focus(); // the button is gone
    answer();
  } else if (pressed.classList.contains("edit")) {
    takeBack(box);
    $("prompt").value = message.content;
    $("prompt").focus();
  }
}

$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("prompt").value.trim();
  if (!text || running || $("model").value === "") return;
  $("prompt").value = "";
  document.querySelector(".results")?.remove(); // the calls go unanswered
  add({ role: "user", content: text }, userMessage);
  answer();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("form").requestSubmit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("log").addEventListener("click", (event) => {
  const pressed = event.target.closest("button"), box = event.target.closest("article");
  if (pressed && box) act(box, pressed);
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  boxes.clear();
  $("log").replaceChildren();
  $("status").textContent = ""; // the answer that was left writes none
  $("prompt").focus();
});
connect();
