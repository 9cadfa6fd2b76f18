"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = text; // never as markup
  return made;
}

function shape(tag, attributes, text) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text) made.textContent = text;
  return made;
}

function spread(values) {
  const low = Math.min(...values), high = Math.max(...values);
  const margin = (high - low || Math.abs(high) || 1) * 0.06;
  return [low - margin, high + margin];
}

// Dots of (predicted score, measured loss), one a subset; missing losses are left out.
function drawScatter(figure, title, target, view) {
  const width = 320, height = 230, left = 46, right = 10, top = 10, bottom = 40;
  const points = view.predicted
    .map((score, subset) => [score, target.losses[subset]])
    .filter((point) => point[1] !== null);
  const svg = shape("svg", { viewBox: `0 0 ${width} ${height}`, role: "img",
    "aria-label": `Predicted score against measured loss of ${points.length} subsets, ` +
      `rank correlation ${view.lds.toFixed(2)}` });
  const [x0, x1] = spread(points.map((point) => point[0]).concat(points.length ? [] : [0]));
  const [y0, y1] = spread(points.map((point) => point[1]).concat(points.length ? [] : [0]));
  const x = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - right);
  const y = (value) => height - bottom - ((value - y0) / (y1 - y0)) * (height - top - bottom);
  svg.append(shape("path", { class: "frame",
    d: `M${left} ${top}V${height - bottom}H${width - right}` }));
  const digits = (span) => Math.max(0, Math.min(4, 1 - Math.floor(Math.log10(span || 1))));
  for (const share of [0.1, 0.5, 0.9]) {
    const loss = y0 + share * (y1 - y0), score = x0 + share * (x1 - x0);
    svg.append(shape("path", { class: "grid", d: `M${left} ${y(loss)}H${width - right}` }));
    svg.append(shape("text", { x: left - 6, y: y(loss) + 4, "text-anchor": "end" },
      loss.toFixed(digits(y1 - y0))));
    svg.append(shape("text", { x: x(score), y: height - bottom + 15, "text-anchor": "middle" },
      score.toFixed(digits(x1 - x0))));
  }
  for (const [score, loss] of points) {
    const dot = shape("circle", { cx: x(score).toFixed(1), cy: y(loss).toFixed(1), r: 4 });
    dot.append(shape("title", {}, `score ${score}, loss ${loss}`));
    svg.append(dot);
  }
  svg.append(shape("text", { x: (left + width - right) / 2, y: height - 6,
    "text-anchor": "middle", class: "axis" }, "predicted score \u2192"));
  svg.append(shape("text", { transform: `translate(11 ${(top + height - bottom) / 2}) rotate(-90)`,
    "text-anchor": "middle", class: "axis" }, "measured loss \u2192"));
  const caption = element("figcaption", "", title + " ");
  caption.append(element("b", "", `\u03c1 = ${view.lds.toFixed(2)}`));
  figure.replaceChildren(caption, svg);
}

function card([place, score], target) {
  const example = data.examples[place];
  const item = element("li", "card");
  const meta = element("p", "meta");
  if (example.task) {
    meta.append(element("span", example.task === target.task ? "task same" : "task", example.task));
  }
  if (target.proponents.includes(example.id)) meta.append(element("span", "tag", "known proponent"));
  meta.append(element("span", "id", example.id), element("span", "score", score.toPrecision(3)));
  item.append(meta, element("p", "prompt", example.prompt), element("p", "response", example.response));
  return item;
}

function chosen(name) {
  return document.querySelector(`input[name=${name}]:checked`).value;
}

function drawPanels(method) {
  const views = data.views[method];
  const order = views.map((_, row) => row).sort((a, b) => views[a].lds - views[b].lds);
  const rows = [...new Set([order[0], order[order.length >> 1], order[order.length - 1]])];
  document.getElementById("panels").replaceChildren(...rows.map((row) => {
    const figure = element("figure", "scatter");
    drawScatter(figure, data.targets[row].task || `Target ${row + 1}`, data.targets[row], views[row]);
    return figure;
  }));
  document.getElementById("scatter-method").textContent =
    data.methods.find((one) => one.name === method).label;
}

function draw() {
  const method = chosen("method"), row = Number(chosen("target"));
  const target = data.targets[row], view = data.views[method][row];
  for (const article of document.querySelectorAll("article.target")) {
    article.hidden = Number(article.dataset.target) !== row;
  }
  drawScatter(document.getElementById("scatter"), "All held-out subsets", target, view);
  for (const end of ["helpful", "harmful"]) {
    document.getElementById(end).replaceChildren(...view[end].map((entry) => card(entry, target)));
  }
  drawPanels(method);
}

document.querySelector(".explorer").addEventListener("change", draw);
draw();
