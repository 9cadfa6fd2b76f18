// The report: its packed data, the explorer and the charts over it, and the table of tasks.
const settings = JSON.parse(document.getElementById("data").textContent);

function unpack(name) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("This browser cannot unpack the page's data; use one from 2023 or newer.");
  }
  const packed = atob(document.getElementById(`block-${name}`).textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream);
}

const blocks = new Map();
function block(name) {
  if (!blocks.has(name)) blocks.set(name, (async () => unpack(name).json())());
  return blocks.get(name);
}

const source = {
  async targets() {
    const index = await block("index");
    return index.map((one, row) => ({ ...one, row, text: `${one.prompt}\n${one.response}` }));
  },
  async target(row) {
    const size = settings.targetsABlock;
    const [index, found] = await Promise.all([
      block("index"), block(`targets-${Math.floor(row / size)}`)]);
    const { losses, views } = found[row % size];
    const example = async ([place, score]) => {
      const texts = await block(`examples-${Math.floor(place / settings.examplesABlock)}`);
      return { ...texts[place % settings.examplesABlock], score };
    };
    const methods = await Promise.all(views.map(async (view, place) => ({
      ...settings.methods[place],
      ...view,
      helpful: await Promise.all(view.helpful.map(example)),
      harmful: await Promise.all(view.harmful.map(example)),
    })));
    return { target: { ...index[row], losses }, methods };
  },
};

// The table of tasks, in the order of the column whose head was pressed.
const tasks = document.getElementById("task-table");
tasks?.addEventListener("click", (event) => {
  const head = event.target.closest("th[aria-sort]");
  if (!head) return;
  const place = head.cellIndex, falling = head.getAttribute("aria-sort") !== "descending";
  const key = (line) => line.cells[place].dataset.value ?? line.cells[place].textContent;
  const compare = place ? (a, b) => key(a) - key(b) : (a, b) => key(a).localeCompare(key(b));
  const body = tasks.tBodies[0];
  body.append(...[...body.rows].sort((a, b) => (falling ? -1 : 1) * compare(a, b)));
  for (const other of tasks.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", falling ? "descending" : "ascending");
});

explore(source, scatter).ready.then(() => {
  const makers = { cost, calibration, learning };
  for (const [name, chart] of Object.entries(settings.plots)) {
    const node = document.getElementById(`plot-${name}`);
    plot(node, chart.about, makers[name](chart)).catch(() => node.replaceChildren(chart.about));
  }
});
