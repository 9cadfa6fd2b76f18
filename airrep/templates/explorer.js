"use strict";

const MOST_LISTED = 1000; // more targets than that are found by filtering
const ENDS = { helpful: "Most helpful", harmful: "Most harmful" };

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = text; // never as markup
  return made;
}

// A radio button or checkbox that looks like a card.
function choice(type, name, value, checked) {
  const label = element("label"), input = element("input"), face = element("span");
  Object.assign(input, { type, name, value, checked });
  label.append(input, face);
  return { label, face };
}

// Does a text hold every word of what was typed?
function holds(text, typed) {
  const lower = text.toLowerCase();
  return typed.toLowerCase().split(/\s+/).every((word) => lower.includes(word));
}

const textOf = (example) =>
  [example.id, example.task, example.prompt, example.response].filter(Boolean).join("\n");

const DIGITS = { minimumSignificantDigits: 3, maximumSignificantDigits: 3 };
const short = (value) => (typeof value === "number" ? value.toLocaleString("en", DIGITS) : "–");

// A list of targets, and the training examples that each method finds behind the chosen one.
//
// `source` gives promises: targets(), a list of {row, id, task, text} and, where they were
// measured, spread and lds; and target(row), {target, methods: [{name, label, helpful, harmful}]}.
// `scatter(node, target, method)` draws predicted against measured losses, where there are any.
function explore(source, scatter) {
  const at = (id) => document.getElementById(id);
  let targets = [], view = null, latest = null, row = null;
  let shown = null; // names of the methods side by side
  let lists = [];

  function say(problem) {
    at("problem").textContent = problem;
    at("problem").hidden = !problem;
  }

  async function show(promise) {
    latest = promise; // an earlier, slower answer must not replace a later one
    at("explorer").setAttribute("aria-busy", "true");
    try {
      const answer = await promise;
      if (latest !== promise) return;
      view = answer;
      say("");
      draw();
    } catch (error) {
      if (latest === promise) say(error.message);
    }
    if (latest === promise) at("explorer").removeAttribute("aria-busy");
  }

  function choose(chosen) {
    row = chosen;
    show(source.target(row));
  }

  const orders = {
    row: (a, b) => a.row - b.row,
    spread: (a, b) => (b.spread ?? -1) - (a.spread ?? -1),
    worst: (a, b) => a.lds - b.lds,
    best: (a, b) => b.lds - a.lds,
  };

  function listTargets() {
    const task = at("task").value, typed = at("find").value;
    const found = targets
      .filter((one) => (!task || one.task === task) &&
        holds(`${one.id}\n${one.task || ""}\n${one.text}`, typed))
      .sort(orders[at("order").value]);
    at("targets").replaceChildren(...found.slice(0, MOST_LISTED).map((one) => {
      const { label, face } = choice("radio", "target", one.row, one.row === row);
      const head = element("small", "", one.task || one.id);
      if (typeof one.lds === "number") head.append(element("b", "", `ρ ${one.lds.toFixed(2)}`));
      face.append(head, one.text.length > 110 ? `${one.text.slice(0, 110)}…` : one.text);
      return label;
    }));
    const listed = found.length > MOST_LISTED ? `; the first ${MOST_LISTED} are listed` : "";
    at("found").textContent = `${found.length} of ${targets.length} targets${listed}`;
  }

  function card(example, target) {
    const item = element("li", "card"), meta = element("p", "meta");
    if (example.task) {
      const same = example.task === target.task ? "task same" : "task";
      meta.append(element("span", same, example.task));
    }
    if ((target.proponents || []).includes(example.id)) {
      item.classList.add("proponent");
      meta.append(element("span", "tag", "known proponent"));
    }
    meta.append(element("span", "id", example.id), element("span", "score", short(example.score)));
    item.append(meta, element("p", "prompt", example.prompt),
      element("p", "response", example.response));
    return item;
  }

  function drawTarget(target) {
    const meta = element("p", "meta");
    meta.append(element("span", "tag", "target"));
    if (target.task) meta.append(element("span", "task", target.task));
    if (target.id) meta.append(element("span", "id", target.id));
    at("target").replaceChildren(meta, element("p", "prompt", target.prompt),
      element("p", "response", target.response));
    const losses = (target.losses || []).filter((loss) => loss !== null);
    if (losses.length) {
      at("target").append(element("p", "measured",
        `Measured loss: ${short(Math.min(...losses))} to ${short(Math.max(...losses))} nats over ` +
        `${losses.length} subsets, standard deviation ${short(target.spread)}.`));
    } else if (typeof target.loss === "number") {
      at("target").append(element("p", "measured", `Loss: ${short(target.loss)} nats.`));
    }
  }

  function drawMethods() {
    const names = view.methods.map((method) => method.name);
    if (!shown) shown = new Set(names.slice(0, 2));
    at("methods").replaceChildren(...view.methods.map((method) => {
      const { label, face } = choice("checkbox", "method", method.name, shown.has(method.name));
      face.textContent = method.label;
      return label;
    }));
  }

  // One method's column; its lists of examples are filled by `fill`.
  function column(method) {
    const node = element("section", "method"), head = element("h3", "", `${method.label} `);
    if (typeof method.lds === "number") head.append(element("b", "", `ρ = ${method.lds.toFixed(2)}`));
    node.append(head);
    if (scatter && method.predicted) node.append(element("figure", "plot scatter"));
    for (const [end, title] of Object.entries(ENDS)) {
      const list = element("ol", end);
      list.setAttribute("aria-label", `${title}, ${method.label}`);
      node.append(element("h4", end, title), list);
      lists.push([list, method[end]]);
    }
    return node;
  }

  function drawViews() {
    lists = [];
    const chosen = view.methods.filter((method) => shown.has(method.name));
    at("views").replaceChildren(...chosen.map(column));
    fill();
    if (!scatter) return;
    at("views").querySelectorAll(".scatter").forEach((node, place) =>
      scatter(node, view.target, chosen[place]));
  }

  function fill() {
    const typed = at("filter").value;
    let matching = 0, all = 0;
    for (const [list, examples] of lists) {
      const kept = examples.filter((example) => holds(textOf(example), typed));
      list.replaceChildren(...kept.map((example) => card(example, view.target)));
      if (!kept.length) list.append(element("li", "none", "No example matches."));
      matching += kept.length;
      all += examples.length;
    }
    at("matching").textContent = lists.length
      ? `${matching} of ${all} examples` : "Choose at least one method.";
  }

  function draw() {
    at("shown").hidden = false;
    drawTarget(view.target);
    drawMethods();
    drawViews();
  }

  async function start() {
    try {
      targets = await source.targets();
    } catch (error) {
      say(error.message);
      return;
    }
    const tasks = [...new Set(targets.map((one) => one.task).filter(Boolean))].sort();
    at("task").append(...tasks.map((task) => new Option(task, task)));
    at("task-field").hidden = !tasks.length;
    at("order-field").hidden = !targets.some((one) => typeof one.spread === "number");
    if (targets.length && !latest) row = targets[0].row;
    listTargets();
    if (row !== null) await show(source.target(row));
  }

  for (const form of at("explorer").querySelectorAll("form")) {
    form.addEventListener("submit", (event) => event.preventDefault());
  }
  for (const id of ["find", "task", "order"]) at(id).addEventListener("input", listTargets);
  at("find").addEventListener("keydown", (event) => {
    if (event.key !== "ArrowDown" && event.key !== "Enter") return;
    const radios = at("targets").querySelectorAll("input");
    const next = [...radios].find((radio) => radio.checked) || radios[0];
    if (!next) return;
    event.preventDefault();
    next.focus();
    if (!next.checked) next.click();
  });
  at("targets").addEventListener("change", (event) => choose(Number(event.target.value)));
  at("methods").addEventListener("change", (event) => {
    if (event.target.checked) shown.add(event.target.value);
    else shown.delete(event.target.value);
    drawViews();
  });
  at("filter").addEventListener("input", fill);
  return { show, ready: start() };
}
