// The page of a server: asks its API and shows the answers.

import { $, counted, decimal, element, say, shortened, svg } from "./elements.js";
import { readExamples } from "./examples.js";
import { colour, direction, dot, drawPlane, mark, project } from "./map.js";

const DEBOUNCE_MS = 250;
const JOB_POLL_SECONDS = 0.5;
const MAX_LINES = 200; // more rows than anyone reads, and few enough for a request

const state = { tasks: [], canRoute: true, map: null, rows: [], selected: 0, job: null, removing: null };

// Requests

/** Returns a function that aborts the former request of a kind and gives the signal of the next one. */
function newest() {
  let controller = null;
  return () => {
    controller?.abort();
    controller = new AbortController();
    return controller.signal;
  };
}

const nextAnswer = newest();
const nextRefresh = newest();

/** Sends a request. Everything that goes wrong becomes an error with a message in words. */
async function api(method, path, { body, signal } = {}) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response, text;
  try {
    response = await fetch(path, { method, headers, signal, body: JSON.stringify(body) });
    text = await response.text();
  } catch (error) {
    signal?.throwIfAborted();
    throw new Error("The server cannot be reached. Check that it is still running.", { cause: error });
  }
  signal?.throwIfAborted();
  if (response.ok) return JSON.parse(text);
  const message = errorMessage(response.status, text);
  if (response.status === 401 || response.status === 403) requestToken(response.status, message, token);
  throw new Error(response.status === 401 ? "The server asks for a token." : message);
}

/** Reads the message of an error, which is no JSON where a proxy has answered. */
function errorMessage(status, text) {
  try {
    const { message } = JSON.parse(text).error;
    return `The server says: ${message}`;
  } catch {
    return `The server answered with status ${status}: ${shortened(text || "no message", 300)}`;
  }
}

/** Shows the field for a token. The focus stays where it is, since someone may be typing. */
function requestToken(status, message, token) {
  const refused = token ? "The server does not accept this token." : "This server asks for a token. Enter it here.";
  $("token-section").hidden = false;
  say("token-message", status === 401 ? refused : message);
}

async function useToken(event) {
  event.preventDefault();
  const token = $("token").value.trim();
  if (!/^[\x21-\x7e]*$/.test(token)) {
    say("token-message", "A token consists of letters, digits and signs of ASCII, without spaces.");
    return;
  }
  sessionStorage.setItem("token", token);
  $("token").value = "";
  $("token-section").hidden = true;
  if (await refresh()) $("texts").focus();
  await ask();
}

// Answers

/** Reads the texts that were typed; a pair is separated by a tab or by bars. */
function readTexts(source) {
  const lines = source.split(/\r?\n/).map((line) => line.trim()).filter((line) => line !== "");
  return lines.slice(0, MAX_LINES).map((line) => {
    const found = /\t| \|\|\| /.exec(line);
    if (!found) return { text: line };
    return { text: line.slice(0, found.index).trim(), text_pair: line.slice(found.index + found[0].length).trim() };
  });
}

const shownText = (input) => (input.text_pair === undefined ? input.text : `${input.text} ||| ${input.text_pair}`);

/** Says in a request which task answers. Names have a prefix, so that a task may be called "all". */
function chosenTask() {
  const { value } = $("task");
  if (value === "all") return { tasks: "*" };
  return value.startsWith("task:") ? { task: value.slice(5) } : {};
}

/** Answers the typed texts. What is still being typed is not recorded as an input. */
async function ask({ record = false } = {}) {
  askSoon.cancel();
  const signal = nextAnswer();
  const inputs = readTexts($("texts").value);
  say("ask-error", "");
  $("results").setAttribute("aria-busy", "true");
  try {
    const body = { inputs, include_instances: true, record, ...chosenTask() };
    const answer = inputs.length ? await api("POST", "v1/predict", { body, signal }) : { predictions: [] };
    showAnswers(inputs, answer.predictions);
  } catch (error) {
    if (signal.aborted) return; // a newer request is under way
    showAnswers([], []);
    say("ask-error", error.message);
  }
  $("results").setAttribute("aria-busy", "false");
}

function showAnswers(inputs, predictions) {
  state.rows = inputs.map((input, index) => ({ input, predictions: [predictions[index]].flat() }));
  state.selected = Math.min(state.selected, Math.max(0, inputs.length - 1));
  const wasInside = $("results").contains(document.activeElement);
  const table = $("results").querySelector("table");
  table.replaceChildren(table.tHead, ...state.rows.map(answerGroup));
  $("results").hidden = state.rows.length === 0;
  if (wasInside) table.querySelector("input:checked")?.focus();
  $("status").textContent = summary();
  drawMap();
  drawBars();
  if (predictions.flat().some(isUnknown)) refresh(); // another client has changed tasks
}

function isUnknown(prediction) {
  return prediction.task !== null && taskNamed(prediction.task)?.version !== prediction.version;
}

const taskNamed = (name) => state.tasks.find((task) => task.name === name);

function summary() {
  const asked = chosenTask().task;
  if (!state.rows.length) return asked === undefined ? "" : `Type a text to try the task ${asked}.`;
  const all = state.rows.flatMap((row) => row.predictions);
  const declined = all.filter((prediction) => prediction.task === null).length;
  const cut = state.rows.length === MAX_LINES ? ` Only the first ${MAX_LINES} lines are answered.` : "";
  const [texts, answers] = [counted(state.rows.length, "text"), counted(all.length - declined, "answer")];
  return `${texts}: ${answers}, ${declined} declined.${cut}`;
}

/** Returns the rows of a text: one for each task that was asked. */
function answerGroup(row, index) {
  const span = Math.max(1, row.predictions.length);
  const group = element("tbody");
  for (let place = 0; place < span; place++) {
    const line = element("tr");
    if (place === 0) line.append(pickCell(index, span), textCell(row.input, span));
    const prediction = row.predictions[place];
    if (prediction === undefined) line.append(wideCell("No task reads such an input."));
    else line.append(...(prediction.task === null ? [declinedCell(prediction)] : answerCells(prediction)));
    group.append(line);
  }
  return group;
}

function pickCell(index, rowSpan) {
  const properties = { type: "radio", name: "selected", checked: index === state.selected };
  const label = `${index + 1}: compare this text with the prototypes`;
  const radio = element("input", { ...properties, "aria-label": label });
  radio.addEventListener("change", () => {
    state.selected = index;
    drawMap();
    drawBars();
  });
  return element("td", { rowSpan }, element("label", { className: "pick" }, radio, `${index + 1}`));
}

function textCell(input, rowSpan) {
  const properties = { className: "text", dir: "auto", rowSpan, scope: rowSpan > 1 ? "rowgroup" : "row" };
  return element("th", properties, shortened(shownText(input), 200));
}

const wideCell = (...children) => element("td", { colSpan: 4, className: "text" }, ...children);

/** Says why an input was declined: its similarity is below the threshold, or it has no words. */
function declinedCell({ routing }) {
  const declined = element("span", { className: "declined" }, "Declined.");
  const nearest = routing?.candidates[0];
  if (!nearest) return wideCell(declined);
  const threshold = taskNamed(nearest.task)?.threshold ?? null;
  const isBelow = threshold !== null && nearest.similarity !== null && nearest.similarity < threshold;
  const why = isBelow ? `, below its threshold of ${decimal(threshold, 2)}.` : ". The text has no words.";
  return wideCell(declined, ` Nearest task: ${nearest.task}, similarity ${decimal(nearest.similarity, 2)}${why}`);
}

function answerCells(prediction) {
  const { task, answer, text, probabilities, version, routing } = prediction;
  const cell = element("td", { className: "name", "data-label": "Task" }, ...named(task));
  const candidate = routing?.candidates.find((one) => one.task === task);
  if (candidate) cell.append(element("div", { className: "note" }, `similarity ${decimal(candidate.similarity, 2)}`));
  const labels = Array.isArray(answer) ? answer : [answer]; // several of a multi-label task
  const number = typeof answer === "number" ? `${Number(answer.toPrecision(4))}` : answer ?? text ?? "none";
  const shown = Array.isArray(answer) ? answer.join("; ") || "no label" : number;
  const confidences = labels.map((label) => probabilities?.[label]).filter((one) => one !== undefined);
  const sure = confidences.map((one) => `${(100 * one).toFixed(1)}%`).join("; ") || "none";
  return [
    cell,
    element("td", { className: "short", dir: "auto", "data-label": "Answer" }, shortened(shown, 200)),
    element("td", { "data-label": "Confidence" }, sure),
    element("td", { "data-label": "Version of the task" }, `${version}`),
  ];
}

// Map and bars

const indexOf = (task) => state.tasks.findIndex((one) => one.name === task);

/** Returns the name of a task behind its mark. */
function named(task) {
  return [svg("svg", { viewBox: "-8 -8 16 16", "aria-hidden": "true" }, mark(indexOf(task), 0, 0, 7, "mark")), task];
}

/** Returns the texts that were typed with their direction and their place on the map. */
function typedPoints() {
  return state.rows.flatMap(({ input, predictions }, index) => {
    const instance = predictions[0]?.instance;
    if (!instance || !state.map) return [];
    const unit = direction(instance);
    return [{ index, input, unit, ...project(unit, state.map) }];
  });
}

/** Returns the cosine to each prototype in descending order. */
function cosines(unit) {
  const found = state.map.prototypes.map(({ task, vector }) => ({ task, cosine: dot(unit, vector) }));
  return found.sort((a, b) => b.cosine - a.cosine);
}

function drawMap() {
  const typed = typedPoints();
  $("map").toggleAttribute("hidden", !state.map);
  if (state.map) drawPlane($("map"), state.map, typed, state.selected, indexOf);
  showPositions(typed);
}

/** Shows what the map shows of the texts as a table. */
function showPositions(typed) {
  $("positions").hidden = typed.length === 0;
  const rows = typed.map(({ index, input, unit, x, y }) => {
    const closest = cosines(unit)[0];
    const text = `${index + 1}: ${shortened(shownText(input), 80)}`;
    const cells = [decimal(closest.cosine, 3), decimal(x, 2), decimal(y, 2)].map((value) => element("td", {}, value));
    const name = element("td", { className: "name" }, ...named(closest.task));
    return element("tr", {}, element("th", { scope: "row", className: "text", dir: "auto" }, text), name, ...cells);
  });
  $("positions").querySelector("tbody").replaceChildren(...rows);
}

function drawBars() {
  const chosen = typedPoints().find((point) => point.index === state.selected);
  $("bars").hidden = !chosen;
  const none = state.rows.length ? "There is nothing to compare." : "Type a text to compare it with the prototypes.";
  $("bars-text").textContent = chosen ? `${chosen.index + 1}: ${shortened(shownText(chosen.input), 200)}` : none;
  $("bars").querySelector("tbody").replaceChildren(...(chosen ? cosines(chosen.unit).map(barRow) : []));
}

/** Returns a bar that starts in the middle, at cosine 0. */
function barRow({ task, cosine }) {
  const bar = element("span", { className: colour(indexOf(task)) });
  bar.style.left = `${50 * (1 + Math.min(0, cosine))}%`;
  bar.style.width = `${50 * Math.abs(cosine)}%`;
  const track = element("span", { className: "track", "aria-hidden": "true" }, bar);
  const number = element("span", { className: "number" }, decimal(cosine, 3));
  const name = element("th", { scope: "row", className: "name" }, ...named(task));
  return element("tr", {}, name, element("td", {}, track, number));
}

// Tasks

/** Reads tasks and map again, and returns whether that was possible. */
async function refresh() {
  const signal = nextRefresh();
  const parts = [
    ["v1/tasks", "tasks-error", (body) => ([state.tasks, state.canRoute] = [body.tasks, body.can_route])],
    ["v1/map", "map-error", (body) => (state.map = body.prototypes.length ? body : null)],
  ];
  let isComplete = true;
  for (const [path, place, keep] of parts) {
    try {
      keep(await api("GET", path, { signal }));
      say(place, "");
    } catch (error) {
      if (signal.aborted) return false; // a newer request is under way
      if (place === "map-error") state.map = null;
      say(place, error.message);
      isComplete = false;
    }
  }
  showChoices();
  showTasks();
  drawMap();
  drawBars();
  return isComplete;
}

/** Offers the tasks as answers, and leaves the choice as it was if that task still exists. */
function showChoices() {
  const select = $("task");
  const chosen = select.value || "find";
  const names = state.tasks.map(({ name }) => [`task:${name}`, name]);
  const found = state.canRoute ? [["find", "Find the task"]] : [];
  const choices = [...found, ["all", "All tasks"], ...names];
  select.replaceChildren(...choices.map(([value, name]) => element("option", { value }, shortened(name, 60))));
  select.value = chosen;
  if (select.selectedIndex < 0) select.selectedIndex = 0;
  const isGenerator = state.tasks.length > 0 && state.tasks.every((one) => one.kind === "text-to-text");
  if (isGenerator) $("kind").value = "text-to-text"; // the only kind of such a model
}

function showTasks() {
  const focused = document.activeElement?.dataset.task;
  $("tasks").replaceChildren(...state.tasks.map(taskRow));
  if (focused === undefined) return;
  const same = [...$("tasks").querySelectorAll("button")].find((button) => button.dataset.task === focused);
  (same ?? $("tasks-heading")).focus();
}

function taskRow(task) {
  const button = element("button", { type: "button", "aria-label": `Remove ${task.name}` }, "Remove");
  button.dataset.task = task.name;
  button.addEventListener("click", () => confirmRemoval(task.name));
  const written = ([metric, value]) => element("div", { className: "score" }, `${metric} ${decimal(value, 3)}`);
  const scores = Object.entries(task.scores).map(written);
  const cells = [
    [task.kind],
    [labelList(task)],
    [`${task.version}`],
    [decimal(task.threshold, 2)],
    scores.length ? scores : ["unknown"],
    [task.examples === null ? "unknown" : `${task.examples}`],
    [`${task.predictions}`],
    [button],
  ];
  const name = element("th", { scope: "row", className: "name" }, ...named(task.name));
  return element("tr", {}, name, ...cells.map((children) => element("td", {}, ...children)));
}

/** Shows few labels as they are, and more of them on demand. */
function labelList({ kind, labels: names }) {
  const all = names.map((name) => shortened(name, 60)).join(", ");
  if (!names.length) return kind === "regression" ? "a number" : "any text";
  if (names.length <= 3) return element("div", { className: "short", title: names.join(", ") }, all);
  const summary = element("summary", {}, `${names.length}: ${shortened(all, 30)}`);
  const items = names.map((name) => element("li", {}, name));
  return element("details", { className: "short", title: names.join(", ") }, summary, element("ul", {}, ...items));
}

function confirmRemoval(name) {
  state.removing = name;
  const consequence = "Its weights are erased from the memory and the folder of the server. This cannot be undone.";
  $("remove-text").textContent = `The task ${name} is removed. ${consequence}`;
  $("remove-dialog").showModal();
}

async function remove() {
  const name = state.removing;
  $("remove-dialog").close();
  say("tasks-error", "");
  say("tasks-status", `Removing ${name}.`);
  try {
    await follow(await api("DELETE", `v1/tasks/${encodeURIComponent(name)}`), () => {});
    await refresh();
    say("tasks-status", `The task ${name} was removed.`);
    await ask();
  } catch (error) {
    say("tasks-status", "");
    say("tasks-error", error.message);
  }
}

// Changes

/** Waits for the end of a change, and reports its progress. */
async function follow(job, report) {
  while (job.state === "queued" || job.state === "running") {
    report(job);
    job = await api("GET", `v1/jobs/${job.id}?wait=${JOB_POLL_SECONDS}`);
  }
  if (job.state === "failed") throw new Error(`The server says: ${job.error}`);
  return job;
}

/** Shows the progress of a new task. The seconds are no live region, which would speak without end. */
function showProgress(job) {
  state.job = job.id;
  $("progress").hidden = false;
  const stage = job.state === "queued" ? "Waiting for other changes." : `Running: ${job.stage}.`;
  if ($("stage").textContent !== stage) $("stage").textContent = stage;
  $("seconds").textContent = `${job.seconds.toFixed(1)} s`;
}

async function cancel() {
  try {
    await api("DELETE", `v1/jobs/${state.job}`);
  } catch (error) {
    say("add-error", error.message);
  }
}

/** Reads the form, and returns the body of the request; what is missing is said and gets the focus. */
function readForm() {
  const [name, kind] = [$("name").value.trim(), $("kind").value];
  try {
    const { examples } = readExamples($("examples").value, kind);
    if (name && examples.length) return { name, kind, examples };
    say("add-error", name ? "Paste examples of the task." : "Give the task a name.");
  } catch (error) {
    say("add-error", error.message);
  }
  $(name ? "examples" : "name").focus();
  return null;
}

async function add(event) {
  event.preventDefault();
  if ($("add").getAttribute("aria-disabled") === "true") return; // disabling it would drop the focus
  say("add-error", "");
  say("added", "");
  const body = readForm();
  if (!body) return;
  $("add").setAttribute("aria-disabled", "true");
  try {
    const job = await follow(await api("POST", "v1/tasks", { body }), showProgress);
    if (job.state === "done") await showAdded(job, body);
    else say("added", `Cancelled: the task ${body.name} was not added.`);
  } catch (error) {
    say("add-error", error.message);
  }
  if (document.activeElement === $("cancel")) $("add").focus();
  $("progress").hidden = true;
  $("add").setAttribute("aria-disabled", "false");
}

/** Chooses the new task for the texts, and moves on to them unless someone works elsewhere by now. */
async function showAdded(job, { name, examples }) {
  await refresh();
  const [count, time] = [counted(examples.length, "example"), job.seconds.toFixed(1)];
  say("added", `The task ${name} was added from ${count} in ${time} s, and is chosen above. Type a text to try it.`);
  $("task").value = `task:${name}`;
  if ($("task").selectedIndex < 0) $("task").selectedIndex = 0; // someone has removed it meanwhile
  $("name").value = $("examples").value = "";
  say("preview", "");
  const focused = document.activeElement;
  if (focused === document.body || $("add-form").contains(focused) || focused === $("cancel")) $("texts").focus();
  await ask();
}

function showPreview() {
  say("add-error", "");
  try {
    const { examples, labels } = readExamples($("examples").value, $("kind").value);
    const listed = [...labels].slice(0, 12).map(([label, count]) => `${shortened(`${label}`, 40)} (${count})`);
    const names = `${listed.join(", ")}${labels.size > 12 ? " and others" : ""}`;
    const found = ["classification", "multi-label"].includes($("kind").value) ? `, ${counted(labels.size, "label")}: ${names}` : "";
    say("preview", examples.length ? `${counted(examples.length, "example")}${found}.` : "");
  } catch (error) {
    say("preview", error.message);
  }
}

// Start

/** Returns a function that calls another one when nothing has happened for a moment. */
function later(work) {
  let timer = 0;
  const start = () => {
    start.cancel();
    timer = setTimeout(work, DEBOUNCE_MS);
  };
  start.cancel = () => clearTimeout(timer);
  return start;
}

const askSoon = later(() => ask());
const askNow = () => ask({ record: true });
$("texts").addEventListener("input", askSoon);
$("texts").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) askNow();
});
$("ask").addEventListener("click", askNow);
$("task").addEventListener("change", () => ask());
$("token-form").addEventListener("submit", useToken);
$("examples").addEventListener("input", later(showPreview));
$("kind").addEventListener("change", showPreview);
$("add-form").addEventListener("submit", add);
$("cancel").addEventListener("click", cancel);
$("refresh").addEventListener("click", refresh);
$("remove-no").addEventListener("click", () => $("remove-dialog").close());
$("remove-yes").addEventListener("click", remove);
new ResizeObserver(drawMap).observe($("map-box"));
showChoices();
await refresh();
await ask(); // a browser may have kept the texts
