// The charts, drawn by plotly in the page's colours.
//
// The drawing library is large: the texts and the explorer come first. The policy names its very
// text by hash, so it may run although it arrives late.
let loading = null;
function plotly() {
  loading ??= (async () => {
    const source = await unpack("plotly").text();
    await new Promise((resume) => setTimeout(resume, 50));
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
  })();
  return loading;
}

const drawn = new Map(); // what each chart's node shows, as a function of the colours

function paint(node, make) {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(`--${name}`).trim();
  const { traces, layout } = make(colour);
  const axis = ({ title, ...more }) => ({
    title: { text: title, font: { size: 14 }, standoff: 6 }, fixedrange: true, automargin: true,
    gridcolor: colour("line"), zerolinecolor: colour("line"), linecolor: colour("soft"), ...more,
  });
  return Plotly.react(node, traces, {
    showlegend: false,
    ...layout,
    xaxis: axis(layout.xaxis),
    yaxis: axis(layout.yaxis),
    dragmode: false,
    margin: { l: 8, r: 14, t: 10, b: 14 },
    font: { family: style.fontFamily, size: 13, color: colour("soft") },
    hoverlabel: { bgcolor: colour("card"), bordercolor: colour("line"),
      font: { color: colour("ink") } },
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
  }, { displayModeBar: false, responsive: true });
}

async function plot(node, about, make) {
  node.setAttribute("role", "img");
  node.setAttribute("aria-label", about);
  await plotly();
  for (const old of drawn.keys()) {
    if (old.isConnected) continue;
    Plotly.purge(old);
    drawn.delete(old);
  }
  if (!node.isConnected) return;
  drawn.set(node, make);
  paint(node, make);
}

// The library reads markup in its texts.
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

const spread = (points, value) => ({
  type: "data", symmetric: false, thickness: 1.4, width: 4,
  array: points.map((point) => point.ci95[1] - value(point)),
  arrayminus: points.map((point) => value(point) - point.ci95[0]),
});

const KINDS = { learned: ["accent", "star"], oracle: ["oracle", "diamond"], plain: ["bar", "circle"] };

function cost({ points }) {
  const middle = Math.sqrt(points[0].rate * points[points.length - 1].rate);
  const above = ({ rate, lds }, place) => {
    const apart = (other) => Math.abs(Math.log(other.rate / rate));
    const [nearest] = [points[place - 1], points[place + 1]].filter(Boolean)
      .sort((a, b) => apart(a) - apart(b));
    return !nearest || lds >= nearest.lds;
  };
  return (colour) => ({
    traces: [{
      mode: "markers+text",
      x: points.map((point) => point.rate),
      y: points.map((point) => point.lds),
      text: points.map((point) => plain(point.label)),
      // Inwards from the edges, and away from the nearest neighbour.
      textposition: points.map((point, place) =>
        `${above(point, place) ? "top" : "bottom"} ${point.rate > middle ? "left" : "right"}`),
      textfont: { size: 12, color: colour("ink") },
      cliponaxis: false,
      marker: { size: 11, color: points.map((point) => colour(KINDS[point.kind][0])),
        symbol: points.map((point) => KINDS[point.kind][1]) },
      error_y: { ...spread(points, (point) => point.lds), color: colour("soft") },
      hovertemplate: "%{text}<br>LDS %{y:.3f}<br>%{x:,.3~s} examples/s<extra></extra>",
    }],
    layout: {
      xaxis: { type: "log", title: "examples prepared a second →", dtick: 1, tickformat: "," },
      yaxis: { title: "LDS →" },
    },
  });
}

// Each line has its own colour and symbol; the table under the chart holds the other methods too.
const COLOURS = ["accent", "hue-0", "hue-1", "hue-2", "hue-3", "hue-4"];
const SYMBOLS = ["circle", "diamond", "square", "cross", "triangle-up", "star"];

function calibration({ lines: all }) {
  const lines = all.slice(0, COLOURS.length);
  const ends = lines.flatMap((line) => line.bins.map((bin) => bin.predicted));
  const diagonal = [Math.min(...ends), Math.max(...ends)];
  return (colour) => ({
    traces: [
      { mode: "lines", x: diagonal, y: diagonal, name: "as predicted", hoverinfo: "skip",
        line: { dash: "dash", color: colour("soft") } },
      ...lines.map(({ label, bins, shown }, place) => ({
        mode: "lines+markers",
        name: plain(label),
        visible: shown ? true : "legendonly",
        x: bins.map((bin) => bin.predicted),
        y: bins.map((bin) => bin.measured),
        marker: { size: 8, symbol: SYMBOLS[place] },
        line: { color: colour(COLOURS[place]) },
        error_y: { type: "data", symmetric: false, thickness: 1.4, width: 4,
          array: bins.map((bin) => bin.high - bin.measured),
          arrayminus: bins.map((bin) => bin.measured - bin.low) },
        customdata: bins.map((bin) => bin.count),
        hovertemplate: "predicted %{x:.3f}<br>measured %{y:.3f}<br>%{customdata} pairs",
      })),
    ],
    layout: {
      showlegend: true,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { color: colour("ink") } },
      xaxis: { title: "predicted fall of the loss, nats →" },
      yaxis: { title: "measured fall, nats →" },
    },
  });
}

function learning({ points, ceiling }) {
  const trainings = points.flatMap(({ labels, by_seed }) => by_seed.map((lds) => ({ labels, lds })));
  return (colour) => ({
    traces: [{
      mode: "markers",
      x: trainings.map((one) => one.labels),
      y: trainings.map((one) => one.lds),
      marker: { size: 5, opacity: 0.5, color: colour("accent") },
      hovertemplate: "one training<br>LDS %{y:.3f}<extra></extra>",
    }, {
      mode: "lines+markers",
      x: points.map((point) => point.labels),
      y: points.map((point) => point.lds),
      marker: { size: 8 },
      line: { color: colour("accent") },
      error_y: { ...spread(points, (point) => point.lds), color: colour("soft") },
      hovertemplate: "%{x:,} labels<br>LDS %{y:.3f}<extra></extra>",
    }],
    layout: {
      xaxis: { title: "training labels →", rangemode: "tozero" },
      yaxis: { title: "LDS →", rangemode: "tozero" },
      shapes: ceiling === null ? [] : [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: ceiling,
        y1: ceiling, line: { dash: "dash", width: 2, color: colour("ceiling") } }],
    },
  });
}

// Dots of (predicted score, measured loss), one a subset; missing losses are left out.
function scatter(node, target, method) {
  const dots = method.predicted
    .map((score, subset) => [score, target.losses[subset]])
    .filter(([score, loss]) => score !== null && loss !== null);
  plot(node, `Predicted score against measured loss of ${dots.length} subsets, rank correlation ` +
    `${short(method.lds)}`, (colour) => ({
    traces: [{
      mode: "markers",
      x: dots.map((dot) => dot[0]),
      y: dots.map((dot) => dot[1]),
      marker: { size: 8, opacity: 0.65, color: colour("accent") },
      hovertemplate: "score %{x}<br>loss %{y}<extra></extra>",
    }],
    layout: {
      xaxis: { title: "predicted score →", nticks: 5, zeroline: false },
      yaxis: { title: "measured loss →", nticks: 5, zeroline: false },
    },
  })).catch(() => node.remove());
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const [node, make] of drawn) paint(node, make);
});
