// The page's side of the protocol in bots/web.py. What a person said and has no answer yet is said again after every
// reconnect, under its old id; the server stores an id once, and says what became of it. Text from outside is only ever
// textContent.
"use strict";

const STORAGE = "palaver-waiting";
const DRAFT = "palaver-draft";
const TYPING_LASTS = 6000; // ms; the server repeats it every 4 s
const SILENT_FOR = 12000; // counted anew at every frame: many lines that wait are taken one after the other

const find = (id) => document.getElementById(id);
const talk = find("talk");
const scroller = find("scroll");
const field = find("text");
const sendButton = document.querySelector("#say button");

const exchanges = new Map(); // message id -> {box, reply}: what is shown, in its order
// message id -> {text, stored, after, note}: what has no answer, with a note: will have none; `after` is the id above
const waiting = new Map();
let socket = null;
let sending = ""; // the id on its way: what was said after it goes when it is stored, or the order would be lost
let connected = false; // the history has come: what is shown is what the server knows
let asked = false; // for the history, which has not come
let resetting = false;
let failures = 0;
let retry = 0;
let overdue = 0;
let typingEnds = 0;
let full = ""; // why the server takes no more pages

// The cookie is there before the first socket, and one tab asks after the other: two new ones would be two people.
const cookie = (navigator.locks ? navigator.locks.request("palaver", askForCookie) : askForCookie()).catch(() => {});

function askForCookie() {
  return fetch("/cookie", { method: "POST", signal: AbortSignal.timeout(5000) });
}

// -- the connection ---------------------------------------------------------------------------------------------

async function connect() {
  clearTimeout(retry);
  await cookie;
  if (socket) return;
  const mine = new WebSocket(location.protocol.replace("http", "ws") + "//" + location.host + "/ws");
  socket = mine;
  mine.onopen = () => {
    // first what the server may not have, then the question for what it has; what else it lacks goes one by one
    transmit();
    ask();
  };
  mine.onmessage = (event) => mine === socket && hear(JSON.parse(event.data));
  mine.onclose = () => mine === socket && lost();
  asked = true; // as soon as it is open, which may never be
  watch();
}

function lost() {
  const abandoned = socket;
  socket = null;
  if (abandoned) abandoned.close();
  connected = false;
  sending = "";
  if (resetting) find("not-now").hidden = false;
  resetting = false;
  failures += 1;
  clearTimeout(overdue);
  overdue = 0;
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
  asked = true;
  watch();
}

function transmit() {
  const unsaid = (said) => said && !said.stored && !said.note;
  if (socket?.readyState !== WebSocket.OPEN || unsaid(waiting.get(sending))) return;
  const next = [...waiting].find(([, said]) => unsaid(said));
  if (!next) return;
  sending = next[0];
  socket.send(JSON.stringify({ id: sending, text: next[1].text }));
  watch();
}

function again(id) {
  if (id === sending) sending = "";
  transmit();
}

// A connection that broke without a word (a sleeping laptop) is silent, and something is not acknowledged. So is a history
// that cannot be read now. An answer may take longer: whether anybody is still there is asked.
function watch() {
  overdue ||= setTimeout(() => {
    overdue = 0;
    const open = [...waiting.values()].filter((said) => !said.note);
    if (!socket) return;
    if (asked || resetting || open.some((said) => !said.stored)) lost();
    else if (open.length) ask();
  }, SILENT_FOR);
}

// -- what the server says ---------------------------------------------------------------------------------------

function hear(frame) {
  clearTimeout(overdue);
  overdue = 0;
  watch();
  if (frame.history) begin(frame.history);
  else if (frame.stored) stored(frame.stored);
  else if (frame.reply) replied(frame.reply);
  else if (frame.closed) closed(frame.closed, frame.note);
  else if (frame.typing) typing(frame.typing, frame.note);
  else if (frame.forgotten) { resetting = false; waiting.clear(); keep(); begin([]); find("sure").close(); }
  else if (frame.full) full = frame.full;
  else if (frame.later) setTimeout(again, 3000, frame.later);
  else if (frame.error) { resetting = false; find("not-now").hidden = false; console.warn("Palaver: " + frame.error); }
  transmit();
}

function begin(turns) {
  const place = atEnd() ? Infinity : scroller.scrollTop;
  talk.setAttribute("aria-busy", "true"); // nobody wants the whole past read out
  asked = connected = false;
  quiet();
  exchanges.clear();
  talk.replaceChildren();
  for (const { role, id, text } of turns) {
    waiting.delete(id); // it has its answer
    if (role === "user") put(id, text);
    else answer(id, text);
  }
  for (const [id, said] of waiting) {
    if (exchanges.has(id)) continue;
    if (said.note && said.after && !exchanges.has(said.after)) { waiting.delete(id); continue; } // of long ago
    if (!said.note) said.after = last(); // it will be answered after all that was
    note(put(id, said.text), said.note);
  }
  keep();
  connected = true;
  failures = 0;
  full = "";
  talk.setAttribute("aria-busy", "false");
  show();
  scroller.scrollTop = Math.min(place, scroller.scrollHeight);
}

function stored({ id, text, heard }) {
  if (exchanges.get(id)?.reply || waiting.get(id)?.note) return;
  const said = waiting.get(id) || remember(id, text); // said in another tab
  said.stored = true;
  const known = exchanges.get(id)?.box;
  const { box } = exchanges.get(id) || put(id, text);
  if (!known || known.classList.contains("sending")) { // its turn comes before that of what is not sent yet
    box.classList.remove("sending");
    const before = [...talk.children].filter((other) => other !== box && !other.classList.contains("sending")).pop();
    const place = before ? before.nextElementSibling : talk.firstElementChild;
    if (place !== box) talk.insertBefore(box, place);
    said.after = before?.dataset.id || "";
  }
  if (!heard) closed(id, "I can only read words. Could you write it out?");
  show();
}

// No reply comes. With a note, it stays as it is, also over a reload; without, the history has what was said elsewhere.
function closed(id, why) {
  const exchange = exchanges.get(id);
  const said = waiting.get(id);
  if (!said || exchange?.reply) return;
  if (why) said.note = why;
  else waiting.delete(id);
  if (!why && connected) ask();
  keep();
  if (!exchange) return;
  const follow = atEnd();
  exchange.box.classList.remove("sending");
  quiet(exchange);
  note(exchange, why);
  if (follow) toEnd();
}

function replied({ to, text }) {
  if (!exchanges.has(to)) return ask(); // the question came from a tab that is gone, or was forgotten
  const follow = atEnd();
  answer(to, text);
  if (follow) toEnd();
}

function typing(id, note) {
  const exchange = exchanges.get(id);
  if (!exchange || exchange.reply) return;
  const follow = atEnd();
  const box = exchange.box;
  const dots = document.querySelector(".typing") || typingDots();
  if (dots.parentNode !== box) box.append(dots);
  dots.querySelector(".note").textContent = note;
  clearTimeout(typingEnds);
  typingEnds = setTimeout(quiet, TYPING_LASTS);
  if (follow) toEnd();
}

function quiet(exchange) { // without one: everywhere
  const dots = document.querySelector(".typing");
  if (dots && (!exchange || dots.parentNode === exchange.box)) dots.remove();
}

// -- what is shown ----------------------------------------------------------------------------------------------

function put(id, text) {
  const exchange = { box: make("div", "exchange") };
  const said = waiting.get(id);
  exchange.box.dataset.id = id;
  exchange.box.classList.toggle("sending", said?.stored === false && !said.note);
  if (text) exchange.box.append(bubble("person", "You said: ", text));
  const above = exchanges.get(said?.after)?.box;
  if (above) above.after(exchange.box);
  else if (said?.after === "") talk.prepend(exchange.box);
  else talk.append(exchange.box);
  exchanges.set(id, exchange);
  return exchange;
}

const last = () => talk.lastElementChild?.dataset.id || ""; // "": above all

function answer(id, text) {
  const exchange = exchanges.get(id) || put(id, ""); // its question is older than what is shown
  if (waiting.delete(id)) keep();
  quiet(exchange);
  note(exchange, "");
  if (exchange.reply) return;
  exchange.reply = bubble("bot", "Palaver said: ", text);
  exchange.box.append(exchange.reply);
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
  exchange.box.querySelector(":scope > .note")?.remove();
  if (text) exchange.box.append(make("p", "note", text));
}

function show() {
  const state = connected ? "connected" : failures ? "lost" : "connecting";
  const status = find("connection");
  const text = { connected: "Connected", lost: full || "Reconnecting …", connecting: "Connecting …" }[state];
  if (status.firstElementChild.textContent !== text) {
    status.dataset.state = state;
    status.firstElementChild.textContent = text;
  }
  find("empty").hidden = exchanges.size > 0 || !connected;
  find("reset").disabled = !connected || exchanges.size === 0;
  sendButton.disabled = !field.value.trim();
  find("limit").hidden = field.value.length < field.maxLength;
}

const atEnd = () => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 80;
const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };

// -- what the person does ---------------------------------------------------------------------------------------

function say(text) {
  text = text.trim();
  if (!text) return;
  const id = [...crypto.getRandomValues(new Uint8Array(12))].map((b) => b.toString(16).padStart(2, "0")).join("");
  remember(id, text);
  put(id, text);
  transmit();
  show();
  toEnd();
}

function remember(id, text) {
  const said = { text, stored: false, after: last() || (connected ? "" : null) }; // null: the history is not here yet
  waiting.set(id, said);
  keep();
  return said;
}

function keep() { // over a reload; where storage is forbidden, only until then
  const texts = [...waiting].map(([id, { text, after, note }]) => [id, text, after, note]);
  try {
    sessionStorage.setItem(STORAGE, JSON.stringify(texts));
    sessionStorage.setItem(DRAFT, field.value);
  } catch { /* as said */ }
}

function fit() {
  const follow = atEnd();
  field.style.height = "auto";
  field.style.height = field.scrollHeight + 2 + "px";
  if (follow) toEnd();
}

find("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = field.value;
  field.value = "";
  say(text);
  fit();
  show();
  field.focus();
});
field.addEventListener("input", () => { show(); fit(); keep(); });
field.addEventListener("keydown", (event) => {
  // 229: in Safari, the Enter that ends a composition comes after it has ended
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    find("say").requestSubmit();
  }
});
find("empty").addEventListener("click", (event) => {
  if (event.target.tagName === "BUTTON") { say(event.target.textContent); field.focus(); }
});
find("reset").addEventListener("click", () => { find("not-now").hidden = true; find("sure").showModal(); });
find("keep").addEventListener("click", () => find("sure").close());
find("forget").addEventListener("click", () => {
  find("not-now").hidden = connected;
  if (!connected) return;
  socket.send(JSON.stringify({ reset: true }));
  resetting = true;
  watch();
});
find("sure").addEventListener("close", () => field.focus());
addEventListener("online", wake);
document.addEventListener("visibilitychange", wake);

try {
  for (const [id, text, after, note] of JSON.parse(sessionStorage.getItem(STORAGE) || "[]")) {
    waiting.set(id, { text, stored: false, after, note });
  }
  field.value = sessionStorage.getItem(DRAFT) || "";
} catch { /* nothing is kept */ }
fit();
connect();
show();
