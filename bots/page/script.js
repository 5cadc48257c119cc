// The page's side of the protocol in bots/web.py. What a person said and has no answer yet is said again after every
// reconnect, under its old id; the server stores an id once. Text from outside is only ever textContent.
"use strict";

const STORAGE = "palaver-waiting";
const TYPING_LASTS = 6000; // ms; the server repeats it every 4 s
const NO_ANSWER_AFTER = 90000;
const ACKNOWLEDGED_WITHIN = 12000;

const find = (id) => document.getElementById(id);
const talk = find("talk");
const scroller = find("scroll");
const field = find("text");
const sendButton = document.querySelector("#say button");

const exchanges = new Map(); // message id -> {box, reply}: what is shown, in its order
const waiting = new Map(); // message id -> {text, stored}: what waits for an answer
let socket = null;
let connected = false; // the history has come: what is shown is what the server knows
let failures = 0;
let retry = 0;
let typingEnds = 0;

// -- the connection ---------------------------------------------------------------------------------------------

function connect() {
  clearTimeout(retry);
  const mine = new WebSocket(location.protocol.replace("http", "ws") + "//" + location.host + "/ws");
  socket = mine;
  mine.onopen = () => {
    // first what the server may not have, then the question for what it has: so the history holds it all
    for (const id of waiting.keys()) transmit(id);
    ask();
  };
  mine.onmessage = (event) => mine === socket && hear(JSON.parse(event.data));
  mine.onclose = () => mine === socket && lost();
}

function lost() {
  const abandoned = socket;
  socket = null;
  if (abandoned) abandoned.close();
  connected = false;
  failures += 1;
  for (const said of waiting.values()) said.stored = false;
  quiet();
  show();
  const pause = Math.min(10000, 250 * 2 ** Math.min(failures, 6));
  clearTimeout(retry);
  retry = setTimeout(connect, pause * (0.5 + Math.random() / 2));
}

function wake() {
  if (!socket && document.visibilityState === "visible") connect();
}

function ask() {
  socket.send(JSON.stringify({ hello: true }));
}

function transmit(id) {
  const mine = socket;
  if (!mine || mine.readyState !== WebSocket.OPEN || !waiting.has(id)) return;
  mine.send(JSON.stringify({ id, text: waiting.get(id).text }));
  // a connection that broke without a word (a sleeping laptop) is found by what it does not acknowledge
  setTimeout(() => mine === socket && waiting.get(id)?.stored === false && lost(), ACKNOWLEDGED_WITHIN);
}

// -- what the server says ---------------------------------------------------------------------------------------

function hear(frame) {
  if (frame.history) begin(frame.history);
  else if (frame.stored) stored(frame.stored);
  else if (frame.reply) replied(frame.reply);
  else if (frame.typing) typing(frame.note || "");
  else if (frame.forgotten) { waiting.clear(); keep(); begin([]); }
  else if (frame.later) setTimeout(transmit, 3000, frame.later);
  else if (frame.error) console.warn("Palaver: " + frame.error);
}

function begin(turns) {
  talk.setAttribute("aria-busy", "true"); // nobody wants the whole past read out
  connected = false;
  quiet();
  exchanges.clear();
  talk.replaceChildren();
  for (const { role, id, text } of turns) {
    if (role === "user") put(id, text);
    else answer(id, text);
  }
  for (const [id, { text }] of waiting) if (!exchanges.has(id)) put(id, text);
  connected = true;
  failures = 0;
  talk.setAttribute("aria-busy", "false");
  show();
  toEnd();
}

function stored({ id, text, heard }) {
  if (exchanges.get(id)?.reply) return;
  if (!heard) settle(id);
  else waiting.set(id, { text, stored: true });
  keep();
  const exchange = exchanges.get(id) || put(id, text); // said in another tab
  note(exchange, heard ? "" : "I can only read words. Could you write it out?");
  exchange.box.classList.remove("sending");
  show();
}

function replied({ to, text }) {
  if (!exchanges.has(to)) return ask(); // the question came from a tab that is gone, or was forgotten
  const follow = atEnd();
  quiet();
  answer(to, text);
  if (follow) toEnd();
}

function typing(note) {
  const first = [...waiting].find(([id, said]) => said.stored && exchanges.has(id));
  if (!first) return;
  const follow = atEnd();
  const box = exchanges.get(first[0]).box;
  const dots = document.querySelector(".typing") || typingDots();
  if (dots.parentNode !== box) box.append(dots);
  dots.querySelector(".note").textContent = note;
  clearTimeout(typingEnds);
  typingEnds = setTimeout(quiet, TYPING_LASTS);
  if (follow) toEnd();
}

function quiet() {
  clearTimeout(typingEnds);
  document.querySelector(".typing")?.remove();
}

// -- what is shown ----------------------------------------------------------------------------------------------

function put(id, text) {
  const exchange = { box: make("div", "exchange") };
  exchange.box.classList.toggle("sending", waiting.get(id)?.stored === false);
  if (text) exchange.box.append(bubble("person", "You said: ", text));
  talk.append(exchange.box);
  exchanges.set(id, exchange);
  setTimeout(() => {
    if (exchanges.get(id) !== exchange || !waiting.get(id)?.stored) return;
    settle(id);
    note(exchange, "Still no answer. Perhaps say it again?");
  }, NO_ANSWER_AFTER);
  return exchange;
}

function answer(id, text) {
  const exchange = exchanges.get(id) || put(id, ""); // its question is older than what is shown
  settle(id);
  note(exchange, "");
  if (exchange.reply) return;
  exchange.reply = bubble("bot", "Palaver said: ", text);
  exchange.box.append(exchange.reply);
}

function settle(id) {
  if (waiting.delete(id)) keep();
}

function bubble(kind, who, text) {
  const element = make("div", "bubble " + kind + (connected ? " new" : ""));
  element.append(make("span", "unseen", who), make("span", "words", text));
  return element;
}

function typingDots() {
  const element = make("div", "bubble bot typing");
  element.append(make("span", "unseen", "Palaver is typing"), make("i"), make("i"), make("i"), make("span", "note"));
  return element;
}

function make(tag, kind = "", text = "") {
  const element = document.createElement(tag);
  element.className = kind;
  element.textContent = text;
  return element;
}

function note(exchange, text) {
  exchange.box.querySelector(".note")?.remove();
  if (text) exchange.box.append(make("p", "note", text));
}

function show() {
  const state = connected ? "connected" : failures ? "lost" : "connecting";
  const status = find("connection");
  if (status.dataset.state !== state) {
    status.dataset.state = state;
    status.firstElementChild.textContent = { connected: "Connected", lost: "Reconnecting …", connecting: "Connecting …" }[state];
  }
  find("empty").hidden = exchanges.size > 0 || !connected;
  find("reset").disabled = !connected || exchanges.size === 0;
  sendButton.disabled = !field.value.trim();
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

// -- what the person does ---------------------------------------------------------------------------------------

function say(text) {
  text = text.trim();
  if (!text) return;
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");
  waiting.set(id, { text, stored: false });
  keep();
  put(id, text);
  transmit(id);
  show();
  toEnd();
}

function keep() { // over a reload; where storage is forbidden, only until then
  const texts = [...waiting].map(([id, { text }]) => [id, text]);
  try { sessionStorage.setItem(STORAGE, JSON.stringify(texts)); } catch { /* as said */ }
}

function fit() {
  field.style.height = "auto";
  field.style.height = field.scrollHeight + 2 + "px";
}

find("say").addEventListener("submit", (event) => {
  event.preventDefault();
  say(field.value);
  field.value = "";
  fit();
  show();
  field.focus();
});
field.addEventListener("input", () => { fit(); show(); });
field.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    find("say").requestSubmit();
  }
});
find("empty").addEventListener("click", (event) => {
  if (event.target.tagName === "BUTTON") { say(event.target.textContent); field.focus(); }
});
find("reset").addEventListener("click", () => find("sure").showModal());
find("keep").addEventListener("click", () => find("sure").close());
find("forget").addEventListener("click", () => {
  find("sure").close();
  if (connected) socket.send(JSON.stringify({ reset: true }));
  field.focus();
});
addEventListener("online", wake);
document.addEventListener("visibilitychange", wake);

try {
  for (const [id, text] of JSON.parse(sessionStorage.getItem(STORAGE) || "[]")) waiting.set(id, { text, stored: false });
} catch { /* nothing is kept */ }
connect();
show();
