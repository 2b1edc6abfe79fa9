"use strict";
// The page of the server: one video, one conversation. The video is sent once and named afterwards;
// the frames that the model sees are shown with their times; times in answers seek the player.
// Everything shown is set as text, never as markup.

const byId = (id) => document.getElementById(id);
const [drop, file, player, statusLine, progressLine] =
  ["drop", "file", "player", "status", "progress"].map(byId);
const [sheet, messageList, question, send, stop, again, sample] =
  ["sheet", "messages", "question", "send", "stop", "again", "sample"].map(byId);

let model = "";
let video = null; // {file, name, url, duration, sampling, asked}
let turns = []; // what was said: {role, content}
let running = null; // AbortController of the answer under way

// ---- the server

const UNREACHABLE = "the server cannot be reached";

class ServerError extends Error {
  constructor(message, code, status) {
    super(message);
    this.code = code;
    this.status = status;
  }
}

function headers(more = {}) {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function check(response) {
  if (response.ok) return response;
  let error = { message: `the server answered ${response.status}` };
  try {
    error = (await response.json()).error ?? error;
  } catch (fault) {
    console.warn("an answer without a reason", fault);
  }
  if (response.status === 401) byId("unlock").hidden = false;
  throw new ServerError(error.message, error.code, response.status);
}

async function reach(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch (fault) {
    // Browsers say no more than that fetching failed, each in words of its own.
    throw fault instanceof TypeError ? new ServerError(UNREACHABLE) : fault;
  }
  return check(response);
}

async function post(path, body, signal) {
  const options = { method: "POST", headers: headers({ "Content-Type": "application/json" }) };
  return reach(path, { ...options, body: JSON.stringify(body), signal });
}

function upload(blob) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("PUT", "v1/uploads");
    for (const [name, value] of Object.entries(headers())) request.setRequestHeader(name, value);
    request.upload.onprogress = (event) => {
      if (video?.file !== blob) {
        request.abort(); // another one was chosen meanwhile
      } else if (event.lengthComputable) {
        say(statusLine, `Sending ${Math.floor((100 * event.loaded) / event.total)} %`);
      }
    };
    request.onerror = request.onabort = () => reject(new ServerError(UNREACHABLE));
    request.onload = () => {
      check(new Response(request.responseText, { status: request.status }))
        .then((response) => response.json())
        .then((answer) => resolve(answer.url), reject);
    };
    request.send(blob);
  });
}

async function loadModel() {
  const answer = await (await reach("v1/models", { headers: headers() })).json();
  model = answer.data[0].id;
  byId("model").textContent = model;
}

// ---- small things

function say(place, text, wrong = false) {
  place.textContent = text;
  place.classList.toggle("wrong", wrong);
}

function clock(seconds) {
  const whole = Math.floor(seconds);
  const two = (n) => String(n).padStart(2, "0");
  const hours = Math.floor(whole / 3600);
  const rest = `${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
  return hours ? `${hours}:${rest}` : rest;
}

function seek(seconds) {
  player.currentTime = seconds;
}

// ---- the video

async function watch(chosen) {
  stopAnswer();
  if (video) URL.revokeObjectURL(player.src);
  video = { file: chosen, name: chosen.name, url: null, duration: 0, sampling: {}, asked: false };
  const current = video;
  forget();
  sheet.replaceChildren();
  byId("sheet-title").hidden = true;
  drop.classList.add("small");
  drop.querySelector("strong").textContent = chosen.name;
  drop.querySelector("span").textContent = "drop another one to change it";
  player.hidden = false;
  player.src = URL.createObjectURL(chosen);
  sample.disabled = true;
  try {
    current.url = await upload(chosen);
    if (video === current) await showFrames();
  } catch (fault) {
    refused(current, fault);
  }
}

// What the server says of a file is not to be written over by what the player says of it.
function refused(current, fault) {
  current.refused = true;
  if (video === current) say(statusLine, fault.message, true);
}

function sampling() {
  const wanted = {};
  const frames = byId("frames").valueAsNumber;
  const fps = byId("fps").valueAsNumber;
  if (frames > 0) wanted.num_frames = Math.round(frames);
  if (fps > 0) wanted.fps = fps;
  return wanted;
}

async function showFrames() {
  const current = video;
  const wanted = sampling();
  current.refused = false;
  sample.disabled = true;
  say(statusLine, "Sampling frames");
  try {
    const found = await (await post("v1/frames", { url: current.url, ...wanted })).json();
    if (video !== current) return;
    const changed = JSON.stringify(wanted) !== JSON.stringify(current.sampling);
    current.sampling = wanted;
    current.duration = found.duration_s;
    // Another sampling is another prompt: the conversation begins anew.
    if (changed && current.asked) {
      stopAnswer();
      forget();
    }
    sheet.replaceChildren(...found.frames.map(cell));
    byId("sheet-title").hidden = false;
    const shown = found.frames.length < found.num_frames ? `, ${found.frames.length} shown` : "";
    say(statusLine, `${found.num_frames} frames of ${clock(found.duration_s)}${shown}`);
  } catch (fault) {
    refused(current, fault);
  } finally {
    sample.disabled = false;
  }
}

function cell(frame) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  const picture = document.createElement("img");
  const time = clock(frame.time_s);
  picture.src = frame.image;
  picture.alt = `frame at ${time}`;
  button.type = "button";
  button.dataset.time = frame.time_s;
  button.append(picture, time);
  button.onclick = () => seek(frame.time_s);
  item.append(button);
  return item;
}

player.ontimeupdate = () => {
  let last = null;
  for (const button of sheet.querySelectorAll("button")) {
    button.classList.remove("now");
    if (Number(button.dataset.time) <= player.currentTime + 0.01) last = button;
  }
  last?.classList.add("now");
};
player.onerror = () => {
  if (player.src && !video?.refused)
    say(statusLine, "This browser cannot play the video; it can still be asked about.");
};

// ---- the conversation

function forget() {
  turns = [];
  if (video) video.asked = false;
  messageList.replaceChildren();
  say(progressLine, "");
  again.disabled = true;
}

function addMessage(role, text) {
  const item = document.createElement("li");
  item.className = role;
  item.textContent = text;
  messageList.append(item);
  item.scrollIntoView({ block: "end" });
  return item;
}

// 1:02:03, 02:03, 02:03.5, 12 s, 12.5 seconds
const TIMES = /\b(?:(\d{1,2}):)?(\d{1,3}):([0-5]\d(?:\.\d+)?)(?![:\d])|\b(\d+(?:\.\d+)?) ?(?:s|sec|seconds?)\b/g;

function withTimes(item, text) {
  const parts = [];
  let end = 0;
  for (const match of text.matchAll(TIMES)) {
    const [, hours, minutes, rest, alone] = match;
    const seconds = alone !== undefined
      ? Number(alone)
      : 3600 * Number(hours ?? 0) + 60 * Number(minutes) + Number(rest);
    if (!video || seconds > video.duration) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "time";
    button.textContent = match[0];
    button.onclick = () => seek(seconds);
    parts.push(text.slice(end, match.index), button);
    end = match.index + match[0].length;
  }
  item.replaceChildren(...parts, text.slice(end));
}

function conversation() {
  return turns.map((turn, number) => {
    if (number > 0 || !video?.url) return turn;
    const address = { url: video.url, ...video.sampling };
    return {
      role: "user",
      content: [{ type: "video_url", video_url: address }, { type: "text", text: turn.content }],
    };
  });
}

function stageText(line) {
  const [name, done, total] = line.split(" ");
  const share = Number(total) ? ` ${Math.floor((100 * Number(done)) / Number(total))} %` : "";
  return { waiting: "Waiting", fetch: "Fetching", decode: `Decoding${share}`, read: `Reading${share}` }[name] ?? "";
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const pieces = rest.split("\n\n");
    rest = pieces.pop();
    for (const piece of pieces) {
      if (piece.startsWith(": ")) say(progressLine, stageText(piece.slice(2)));
      else if (piece === "data: [DONE]") return;
      else if (piece.startsWith("data: ")) yield JSON.parse(piece.slice(6));
    }
  }
}

async function request(signal) {
  const body = { model, messages: conversation(), stream: true };
  try {
    return await post("v1/chat/completions", body, signal);
  } catch (fault) {
    if (fault.code !== "upload_not_found" || !video) throw fault;
    video.url = await upload(video.file);
    return post("v1/chat/completions", { ...body, messages: conversation() }, signal);
  }
}

async function ask(text) {
  const control = new AbortController();
  running = control;
  turns.push({ role: "user", content: text });
  if (video) video.asked = true;
  const asked = addMessage("user", text);
  const item = addMessage("assistant", "");
  send.hidden = true;
  stop.hidden = false;
  say(progressLine, "Waiting");
  let said = "";
  let ended = false;
  try {
    for await (const event of events(await request(control.signal))) {
      if (event.error) throw new ServerError(event.error.message, event.error.code);
      const choice = event.choices[0];
      if (choice?.delta.content) {
        said += choice.delta.content;
        item.textContent = said;
        say(progressLine, "");
        item.scrollIntoView({ block: "end" });
      }
      if (choice?.finish_reason) ended = true;
      if (choice?.finish_reason === "length") item.classList.add("cut");
    }
    say(progressLine, "");
  } catch (fault) {
    if (control.signal.aborted) {
      item.classList.add("cut");
      if (!running) say(progressLine, "");
    } else say(progressLine, fault.message, true);
    if (!said && !ended && turns.at(-1)?.role === "user") {
      // Nothing was answered: the question goes back to be changed.
      turns.pop();
      asked.remove();
      if (!question.value) question.value = text;
    }
  } finally {
    if (running === control) running = null;
    if ((said || ended) && asked.isConnected) turns.push({ role: "assistant", content: said });
    if (said) withTimes(item, said);
    else if (ended) item.classList.add("empty");
    else item.remove();
    again.disabled = turns.length === 0;
    send.hidden = running !== null;
    stop.hidden = running === null;
  }
}

function stopAnswer() {
  running?.abort();
  running = null;
}

// ---- wiring

drop.ondragover = (event) => {
  event.preventDefault();
  drop.classList.add("over");
};
drop.ondragleave = () => drop.classList.remove("over");
drop.ondrop = (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  if (event.dataTransfer.files.length) watch(event.dataTransfer.files[0]);
};
// A video dropped beside the field must not replace the page.
document.ondragover = (event) => event.preventDefault();
document.ondrop = (event) => event.preventDefault();
drop.onkeydown = (event) => {
  if (event.key === "Enter" || event.key === " ") file.click();
};
file.onchange = () => {
  if (file.files.length) watch(file.files[0]);
  file.value = "";
};
byId("sampling").onsubmit = (event) => {
  event.preventDefault();
  if (video?.url) showFrames();
};
byId("ask").onsubmit = (event) => {
  event.preventDefault();
  const text = question.value.trim();
  if (!text || running) return;
  if (video && !video.url) {
    const why = video.refused ? "was not sent; choose it again" : "is still being sent";
    say(progressLine, `The video ${why}.`, true);
    return;
  }
  question.value = "";
  ask(text);
};
question.onkeydown = (event) => {
  // The Enter that ends a word of an input method belongs to it; Safari knows it by 229 only.
  if (event.isComposing || event.keyCode === 229) return;
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    byId("ask").requestSubmit();
  }
};
stop.onclick = stopAnswer;
again.onclick = () => {
  stopAnswer();
  forget();
};
byId("unlock").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", byId("key").value);
  byId("unlock").hidden = true;
  start();
};

function start() {
  loadModel().then(
    () => say(progressLine, ""),
    (fault) => say(progressLine, fault.message, true),
  );
}
start();
