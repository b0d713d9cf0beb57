"use strict";

const $ = (id) => document.getElementById(id);
const MIB = 1024 * 1024;

// Relative URLs throughout: the page works under any mount.

// --- clock, numbers, charts -------------------------------------------------------------------------------------------

// Date.now() has whole milliseconds, performance.now() has no epoch. Date.now() rounds down, so the largest difference
// of the two seen is the true offset to within a fraction of a millisecond. It is found anew now and then, because
// performance.now() stands still while some systems sleep.
let clockOffset = 0;
function setClock() {
  let offset = -Infinity;
  const end = performance.now() + 4;
  while (performance.now() < end) offset = Math.max(offset, Date.now() - performance.now());
  clockOffset = offset;
}
const now = () => clockOffset + performance.now();
setClock();
setInterval(setClock, 30000);
document.addEventListener("visibilitychange", setClock);

// The two clocks agree to a fraction of a millisecond; less than nothing, by less than one, is nothing.
const notNegative = (value) => (value > -1 ? Math.max(0, value) : value);
const milliseconds = (value) => `${value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0)} ms`;
const mebibytes = (bytes) => bytes < 1024 * MIB ? `${(bytes / MIB).toFixed(1)} MiB` : `${(bytes / MIB / 1024).toFixed(2)} GiB`;
const timeOfDay = (ms) => {
  const date = new Date(ms);
  return `${date.toTimeString().slice(0, 8)}.${String(date.getMilliseconds()).padStart(3, "0")}`;
};

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((top) => top >= value);
}

function setState(element, text, kind = "") {
  element.textContent = text;
  element.className = `state ${kind}`;
}

// Draw `values` from the right edge, `slots` of them across the width. Returns the value at the top of the chart.
function draw(svg, values, slots, atLeast) {
  const top = niceTop(Math.max(atLeast, ...values));
  const points = values.map((value, i) =>
    `${(slots - values.length + i).toFixed(1)},${(100 - Math.max(0, value) / top * 100).toFixed(2)}`);
  svg.setAttribute("viewBox", `0 0 ${slots - 1} 100`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren();
  if (points.length > 1) {
    const add = (name, list) => {
      const shape = document.createElementNS("http://www.w3.org/2000/svg", name);
      shape.setAttribute("points", list.join(" "));
      svg.append(shape);
    };
    add("polygon", [`${slots - values.length},100`, ...points, `${slots - 1},100`]);
    add("polyline", points);
  }
  return top;
}

// --- live events ------------------------------------------------------------------------------------------------------

const ROWS = 40;
const DELAYS = 100;
const delays = [];
let stream = null;
let events = 0;

function openEvents() {
  stream = new EventSource(`events?rate=${$("events-rate").value}`);
  setState($("events-state"), "connecting");
  stream.onopen = () => setState($("events-state"), "streaming", "good");
  stream.onerror = () => setState($("events-state"), "lost; the browser connects again", "bad");
  stream.onmessage = showEvent;
  $("events-toggle").textContent = "Pause";
}

function closeEvents() {
  stream.close();
  stream = null;
  setState($("events-state"), "paused");
  $("events-toggle").textContent = "Resume";
}

function showEvent(event) {
  const arrived = now();
  const { sent } = JSON.parse(event.data);
  const delay = notNegative(arrived - sent * 1000);
  events += 1;
  delays.push(delay);
  if (delays.length > DELAYS) delays.shift();

  const row = $("events-rows").insertRow(0);
  for (const text of [events, timeOfDay(sent * 1000), timeOfDay(arrived), milliseconds(delay)]) row.insertCell().textContent = text;
  if ($("events-rows").rows.length > ROWS) $("events-rows").deleteRow(-1);

  const sorted = [...delays].sort((a, b) => a - b);
  $("delay-median").textContent = milliseconds(sorted[sorted.length >> 1]);
  $("delay-max").textContent = milliseconds(sorted.at(-1));
  $("events-count").textContent = events;
  $("delay-scale").textContent = milliseconds(draw($("delay-chart"), delays, DELAYS, 5));
}

$("events-toggle").onclick = () => (stream ? closeEvents() : openEvents());
$("events-rate").onchange = () => {
  if (stream) stream.close();
  delays.length = 0;
  openEvents();
};
openEvents();

// --- transfers --------------------------------------------------------------------------------------------------------

function showProgress(kind, done, total, started, ended = false) {
  const seconds = Math.max((performance.now() - started) / 1000, 0.001);
  $(`${kind}-progress`).value = total ? done / total : 0;
  const text = `${mebibytes(done)} of ${mebibytes(total)} at ${(done / MIB / seconds).toFixed(0)} MiB/s`;
  setState($(`${kind}-state`), ended ? `${text}, complete in ${seconds.toFixed(2)} s` : text, ended ? "good" : "");
}

function setRunning(kind, running) {
  $(`${kind}-start`).disabled = running;
  $(`${kind}-cancel`).disabled = !running;
}

async function download() {
  const total = Number($("download-size").value);
  const speed = Number($("download-speed").value);
  const aborter = new AbortController();
  const started = performance.now();
  let done = 0;
  let shown = 0;
  setRunning("download", true);
  $("download-cancel").onclick = () => aborter.abort();
  try {
    const response = await fetch(`download?bytes=${total}`, { signal: aborter.signal, cache: "no-store" });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const reader = response.body.getReader();
    for (;;) {
      const { value, done: ended } = await reader.read();
      if (ended) break;
      done += value.length;
      const ahead = speed ? done / speed * 1000 - (performance.now() - started) : 0;
      if (ahead > 0) await new Promise((wake) => setTimeout(wake, ahead));
      if (performance.now() - shown > 100) {
        shown = performance.now();
        showProgress("download", done, total, started);
      }
    }
    showProgress("download", done, total, started, true);
  } catch (error) {
    const cancelled = aborter.signal.aborted;
    setState($("download-state"), cancelled ? `cancelled after ${mebibytes(done)}` : `failed after ${mebibytes(done)}: ${error.message}`, cancelled ? "" : "bad");
  }
  setRunning("download", false);
  showMemory();
}

function upload() {
  const total = Number($("upload-size").value);
  const piece = new Uint8Array(MIB);
  // One mebibyte, many times: the browser need not make the whole body first.
  const body = new Blob(new Array(total / MIB).fill(piece));
  const request = new XMLHttpRequest();
  const started = performance.now();
  setRunning("upload", true);
  $("upload-cancel").onclick = () => request.abort();
  request.upload.onprogress = (event) => showProgress("upload", event.loaded, total, started);
  request.onload = () => {
    if (request.status !== 200) return setState($("upload-state"), `status ${request.status}: ${request.responseText}`, "bad");
    const received = JSON.parse(request.responseText).bytes;
    showProgress("upload", received, total, started, true);
    if (received !== total) setState($("upload-state"), `the upstream counted ${received} bytes of ${total}`, "bad");
  };
  request.onerror = () => setState($("upload-state"), "failed: the connection broke", "bad");
  request.onabort = () => setState($("upload-state"), "cancelled");
  request.onloadend = () => {
    setRunning("upload", false);
    showMemory();
  };
  request.open("POST", "upload");
  request.setRequestHeader("Content-Type", "application/octet-stream");
  request.send(body);
}

$("download-start").onclick = download;
$("upload-start").onclick = upload;

// --- memory -----------------------------------------------------------------------------------------------------------

const MEMORY = 120;
const memory = [];
let memoryMax = 0;

async function showMemory() {
  let state;
  try {
    const response = await fetch("memory", { cache: "no-store" });
    if (!response.ok) return;
    state = await response.json();
  } catch {
    return; // The proxy was stopped; the event stream says so.
  }
  $("memory-pid").textContent = state.pid;
  $("upstream-sent").textContent = mebibytes(state.sent);
  $("upstream-received").textContent = mebibytes(state.received);
  if (state.rss === null) {
    $("memory-now").textContent = "not known here";
    return;
  }
  memory.push(state.rss);
  if (memory.length > MEMORY) memory.shift();
  memoryMax = Math.max(memoryMax, state.rss);
  $("memory-now").textContent = mebibytes(state.rss);
  $("memory-max").textContent = mebibytes(memoryMax);
  $("memory-scale").textContent = `${(draw($("memory-chart"), memory.map((rss) => rss / MIB), MEMORY, 50)).toFixed(0)} MiB`;
}

setInterval(showMemory, 1000);
showMemory();

// --- websocket --------------------------------------------------------------------------------------------------------

const PINGS = 100;
const PING_EVERY = 250;
const MESSAGE = 64 * 1024;
const IN_FLIGHT = 4 * MIB;
const MEASURE = 3000;
const pings = [];
let socket = null;
let pinging = null;
let measured = null; // { sent, received, started } while throughput is measured

function openSocket() {
  const url = new URL("websocket", location.href);
  url.protocol = url.protocol.replace("http", "ws");
  socket = new WebSocket(url);
  socket.binaryType = "arraybuffer";
  setState($("socket-state"), "connecting");
  $("socket-toggle").textContent = "Disconnect";
  socket.onopen = () => {
    setState($("socket-state"), "connected", "good");
    setSocketControls(true);
    pinging = setInterval(ping, PING_EVERY);
    ping();
  };
  socket.onmessage = takeMessage;
  socket.onclose = (event) => {
    clearInterval(pinging);
    socket = measured = null;
    setSocketControls(false);
    $("socket-toggle").textContent = "Connect";
    setState($("socket-state"), `closed, code ${event.code}${event.reason ? `: ${event.reason}` : ""}`, event.wasClean ? "" : "bad");
  };
}

function setSocketControls(on) {
  for (const id of ["socket-message", "socket-send", "socket-throughput"]) $(id).disabled = !on;
}

// Scripts cannot send ping frames, so a small message with its time does.
function ping() {
  if (!measured) socket.send(`ping ${performance.now()}`);
}

function takeMessage({ data }) {
  if (data instanceof ArrayBuffer) takeBinary(data.byteLength);
  else if (data.startsWith("ping ")) takePing(performance.now() - Number(data.slice(5)));
  else logMessage(`← ${data}`);
}

function takePing(delay) {
  pings.push(delay);
  if (pings.length > PINGS) pings.shift();
  const sorted = [...pings].sort((a, b) => a - b);
  $("ping-now").textContent = milliseconds(delay);
  $("ping-median").textContent = milliseconds(sorted[sorted.length >> 1]);
  $("ping-max").textContent = milliseconds(sorted.at(-1));
  $("ping-scale").textContent = milliseconds(draw($("ping-chart"), pings, PINGS, 5));
}

function logMessage(text) {
  const log = $("socket-log");
  log.textContent = (log.dataset.used ? `${log.textContent}\n` : "") + text;
  log.dataset.used = "1";
  log.scrollTop = log.scrollHeight;
}

function measure() {
  measured = { sent: 0, received: 0, started: performance.now() };
  $("socket-throughput").disabled = true;
  setState($("socket-state"), "measuring");
  fill();
}

const piece = new Uint8Array(MESSAGE);
function fill() {
  while (measured.sent - measured.received < IN_FLIGHT && performance.now() - measured.started < MEASURE) {
    socket.send(piece);
    measured.sent += MESSAGE;
  }
}

function takeBinary(size) {
  if (!measured) return;
  measured.received += size;
  const seconds = (performance.now() - measured.started) / 1000;
  $("socket-speed").textContent = `${(measured.received / MIB / seconds).toFixed(0)} MiB/s`;
  fill();
  if (measured.received < measured.sent) return;
  measured = null;
  $("socket-throughput").disabled = false;
  setState($("socket-state"), "connected", "good");
}

function sendMessage() {
  const text = $("socket-message").value;
  logMessage(`→ ${text}`);
  socket.send(text);
}

$("socket-toggle").onclick = () => (socket ? socket.close(1000) : openSocket());
$("socket-send").onclick = sendMessage;
$("socket-message").onkeydown = (event) => { if (event.key === "Enter") sendMessage(); };
$("socket-throughput").onclick = measure;

// --- statuses and errors ----------------------------------------------------------------------------------------------

function element(name, text, className = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

async function ask(path) {
  const started = performance.now();
  const seen = { path, status: null, reason: "", headers: [], body: "", error: null };
  let length = 0;
  try {
    const response = await fetch(path, { cache: "no-store", redirect: "manual" });
    seen.status = response.status;
    seen.reason = response.statusText;
    seen.headers = [...response.headers];
    // Piece by piece, so that what came before an error is shown as well.
    const reader = response.body ? response.body.getReader() : null;
    const decoder = new TextDecoder();
    while (reader) {
      const { value, done } = await reader.read();
      if (done) break;
      length += value.length;
      seen.body += decoder.decode(value, { stream: true });
    }
  } catch (error) {
    seen.error = `${error.name}: ${error.message}`;
  }
  return { ...seen, length, seconds: (performance.now() - started) / 1000 };
}

function showAnswer(seen) {
  const title = element("h3", seen.status === null ? "no response" : `${seen.status} ${seen.reason}`,
    seen.error || seen.status === null || seen.status >= 400 ? "bad" : "good");
  title.append(element("small", `GET /${seen.path} · ${(seen.seconds * 1000).toFixed(0)} ms · ${seen.length} bytes of body`));
  const columns = element("div", "", "columns");
  const heads = element("div", "");
  heads.append(element("h4", "Headers, as far as the browser tells"), element("pre", seen.headers.map(([name, value]) => `${name}: ${value}`).join("\n") || "none"));
  const body = element("div", "");
  body.append(element("h4", "Body"), element("pre", seen.body.slice(0, 4096) || "empty"));
  columns.append(heads, body);
  $("answer").replaceChildren(title);
  if (seen.error) $("answer").append(element("p", `The browser reports: ${seen.error}`, "bad"));
  $("answer").append(columns);
}

let asked = 0;
for (const button of $("playground").querySelectorAll("button")) {
  button.onclick = async () => {
    asked += 1;
    const mine = asked;
    for (const other of $("playground").querySelectorAll("button")) other.setAttribute("aria-pressed", other === button);
    $("answer").replaceChildren(element("p", `GET /${button.dataset.path} …`, "note"));
    const seen = await ask(button.dataset.path);
    if (mine === asked) showAnswer(seen); // A slow answer must not replace the one asked for after it.
  };
}
