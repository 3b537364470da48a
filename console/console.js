// The run list, open approvals, and one run's events live. All text is inserted as text; the token lives in this tab only.

import { showApprovals } from "/console/approvals.js";
import { Speech } from "/console/speech.js";

const KEY = "mainspring.token";
const REFRESH_MS = 2000;
const RECONNECT_MS_MIN = 250;
const RECONNECT_MS_MAX = 5000;
const PAGE_SIZE = 50;
const TERMINAL = new Set(["agent_completed", "agent_failed", "agent_cancelled", "agent_timed_out"]);
// Close codes after which coming again would be refused again.
const FINAL_CODES = new Set([4400, 4401, 4403, 4406]);

const at = (id) => document.getElementById(id);
// `seqs`: the last seq shown of the open run and of each run below it that has not ended.
const state = { pages: 1, refreshing: 0, openRun: "", seqs: new Map(), ended: false, socket: null, reconnect: 0, delay: RECONNECT_MS_MIN };
const speech = new Speech();

function token() { return sessionStorage.getItem(KEY); }

function showFault(text) {
  at("fault").textContent = text;
  at("fault").hidden = !text;
}

// Announced by screen readers when it changes, so it is set only then.
function showConnection(text) {
  if (at("connection").textContent !== text) at("connection").textContent = text;
}

function signOut(reason) {
  sessionStorage.removeItem(KEY);
  clearTimeout(state.refreshing);
  closeRun();
  at("run-rows").replaceChildren();
  for (const id of ["runs", "run", "approvals", "forget"]) at(id).hidden = true;
  at("credential").hidden = false;
  showConnection("");
  showFault(reason);
  at("token").focus();
}

function signIn() {
  at("credential").hidden = true;
  for (const id of ["runs", "forget"]) at(id).hidden = false;
  showFault("");
  refresh();
}

// Runs.

async function ask(path, body) {
  const headers = { Authorization: `Bearer ${token()}`, ...(body && { "Content-Type": "application/json" }) };
  const answer = await fetch(path, { headers, method: body ? "POST" : "GET", body: body && JSON.stringify(body) });
  const said = await answer.json();
  if (answer.status === 401) { signOut(said.detail); return null; }
  if (!answer.ok) throw new Error(said.detail);
  return said;
}

function readPage(pageToken) {
  const query = new URLSearchParams({ page_size: String(PAGE_SIZE) });
  if (pageToken) query.set("page_token", pageToken);
  return ask(`/v1/runs?${query}`);
}

async function refreshApprovals() {
  const body = await ask("/v1/approvals");
  if (body) showApprovals(body.approvals, { answer, open: openRun });
}

async function answer(approvalId, body) {
  await ask(`/v1/approvals/${approvalId}:resolve`, body);
  await refresh();
}

async function refresh() {
  clearTimeout(state.refreshing);
  try {
    const runs = [];
    let next = "";
    for (let page = 0; page < state.pages; page += 1) {
      const body = await readPage(next);
      if (!body) return;
      runs.push(...body.runs);
      next = body.next_page_token;
      if (!next) break;
    }
    showRuns(runs, Boolean(next));
    await refreshApprovals();
    showConnection("Live");
    showFault("");
  } catch (error) {
    showConnection("Not reachable, trying again");
    showFault(error.message);
  }
  if (token()) state.refreshing = setTimeout(refresh, document.hidden ? REFRESH_MS * 5 : REFRESH_MS);
}

function showRuns(runs, hasMore) {
  const known = new Map([...at("run-rows").children].map((row) => [row.dataset.run, row]));
  const rows = runs.map((run) => fillRow(known.get(run.run_id) ?? newRow(run.run_id), run));
  const isSame = rows.length === at("run-rows").children.length && rows.every((row, i) => row === at("run-rows").children[i]);
  if (!isSame) at("run-rows").replaceChildren(...rows);
  at("no-runs").hidden = runs.length > 0;
  at("more").hidden = !hasMore;
}

function newRow(runId) {
  const row = at("run-row").content.firstElementChild.cloneNode(true);
  row.dataset.run = runId;
  row.querySelector(".open").textContent = runId.slice(-12);
  row.querySelector(".open").addEventListener("click", () => openRun(runId, row.querySelector(".agent").textContent));
  return row;
}

function fillRow(row, run) {
  const cell = (name) => row.querySelector(`.${name}`);
  cell("state").textContent = run.state;
  cell("state").className = `state ${run.state}`;
  cell("agent").textContent = run.agent;
  cell("time").textContent = new Date(run.create_time).toLocaleString();
  cell("took").textContent = run.start_time && run.end_time ? duration(new Date(run.end_time) - new Date(run.start_time)) : "";
  cell("open").setAttribute("aria-label", `Events of run ${run.run_id}`);
  row.setAttribute("aria-current", String(run.run_id === state.openRun));
  return row;
}

function duration(ms) { return ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`; }

// One run, over the WebSocket. After a break it follows on from the last seq.

function openRun(runId, agent) {
  closeRun();
  Object.assign(state, { openRun: runId, seqs: new Map([[runId, 0]]), ended: false });
  at("events").replaceChildren();
  showSpeech(null);
  at("run").hidden = false;
  at("run-title").textContent = `${agent} · ${runId}`;
  at("run-title").focus();
  for (const row of at("run-rows").children) row.setAttribute("aria-current", String(row.dataset.run === runId));
  connect();
}

function closeRun() {
  clearTimeout(state.reconnect);
  const socket = state.socket;
  speech.clear();
  Object.assign(state, { socket: null, openRun: "", delay: RECONNECT_MS_MIN });
  if (socket) socket.close(1000);
}

function connect() {
  const scheme = location.protocol === "https:" ? "wss:" : "ws:";
  const socket = new WebSocket(`${scheme}//${location.host}/v1/stream`, "mainspring.v1.json");
  state.socket = socket;
  at("run-state").textContent = "Connecting";
  socket.addEventListener("open", () => socket.send(JSON.stringify({ op: "hello", token: token() })));
  socket.addEventListener("message", (message) => { if (socket === state.socket) receive(JSON.parse(message.data)); });
  socket.addEventListener("close", (event) => { if (socket === state.socket) reconnect(event); });
}

function reconnect(event) {
  if (event.code === 4401) { signOut("The token is no longer valid: enter a new one."); return; }
  if (state.ended || FINAL_CODES.has(event.code)) return;
  at("run-state").textContent = "Connection lost, coming back";
  state.reconnect = setTimeout(connect, state.delay * (0.5 + Math.random() / 2));
  state.delay = Math.min(state.delay * 2, RECONNECT_MS_MAX);
}

function receive(frame) {
  if (frame.op === "welcome") {
    state.delay = RECONNECT_MS_MIN;
    for (const [runId, seq] of state.seqs) {
      state.socket.send(JSON.stringify({ op: "follow", id: runId, run_id: runId, after_seq: seq }));
    }
    at("run-state").textContent = "Live";
  } else if (frame.op === "error" && frame.id === state.openRun) {
    at("run-state").textContent = `${frame.reason}: ${frame.message}`;
  } else if (frame.op === "delta") {
    if (speech.take(frame)) showSpeech(frame);
  } else if (frame.op === "event" && frame.seq > (state.seqs.get(frame.run_id) ?? Infinity)) {
    takeEvent(frame);
  }
}

function takeEvent(frame) {
  state.seqs.set(frame.run_id, frame.seq);
  // The gateway follows a run that is announced by itself; after a break it is followed from here.
  if (frame.data.sub_run_id) state.seqs.set(frame.data.sub_run_id, 0);
  speech.endWith(frame);
  showSpeech(null);
  showEvent(frame);
  if (frame.type === "approval_requested" || frame.type === "approval_resolved") refresh();
  if (TERMINAL.has(frame.type) && frame.run_id !== state.openRun) state.seqs.delete(frame.run_id);
  if (frame.run_id !== state.openRun) return;
  at("run-state").textContent = standing(frame);
  if (TERMINAL.has(frame.type)) {
    state.ended = true;
    state.socket.close(1000);
    refresh();
  }
}

// Where the run stands after an event of its own.
function standing({ type, data }) {
  if (TERMINAL.has(type)) return `Ended: ${type.replace("agent_", "").replace("_", " ")}`;
  if (type === "agent_paused") return `Paused by ${data.requested_by}`;
  if (type !== "agent_waiting") return "Live";
  const until = data.until ? `, until ${new Date(data.until).toLocaleString()} at most` : "";
  return `Waiting for ${data.detail || data.for}${until}`;
}

function showSpeech(delta) {
  at("speech").hidden = !speech.text;
  at("speech").textContent = speech.text;
  if (delta) at("speech").scrollTop = at("speech").scrollHeight;
}

function showEvent(frame) {
  const row = at("event-row").content.firstElementChild.cloneNode(true);
  const isBelow = frame.run_id !== state.openRun;
  row.classList.toggle("below", isBelow);
  row.querySelector(".seq").textContent = frame.seq;
  row.querySelector(".type").textContent = isBelow ? `${frame.agent} · ${frame.type}` : frame.type;
  row.querySelector(".gist").textContent = gist(frame.data);
  row.querySelector("time").textContent = new Date(frame.event_time).toLocaleTimeString();
  row.querySelector("time").dateTime = frame.event_time;
  row.querySelector("pre").textContent = JSON.stringify(frame.data, null, 2);
  at("events").append(row);
}

function gist(data) {
  const handedOff = data.from && data.to && `${data.from} → ${data.to}`;
  const parts = [
    data.tool, data.status, data.text, data.title, data.decision, data.name, handedOff, data.detail, data.reason,
    data.error?.message, data.by && `by ${data.by}`, data.requested_by && `by ${data.requested_by}`,
  ];
  if (data.duration_ms) parts.push(duration(data.duration_ms));
  return parts.filter(Boolean).join(" · ");
}

at("credential").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, at("token").value.trim());
  at("token").value = "";
  signIn();
});
at("forget").addEventListener("click", () => signOut(""));
at("more").addEventListener("click", () => { state.pages += 1; refresh(); });
document.addEventListener("visibilitychange", () => { if (!document.hidden && token()) refresh(); });

if (token()) signIn();
else signOut("");
