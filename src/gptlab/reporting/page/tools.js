"use strict";
/* What all parts of the page share: the data, what the reader has chosen, elements, numbers, colours.
   Strings of runs are written as text (textContent), never as HTML; Plotly, which reads some HTML, has them by plain(). */

let DATA = JSON.parse(document.getElementById("data").textContent);

const CHOSEN = {
  axis: "tokens",
  logX: false,
  logY: false,
  whole: false,
  train: true,
  val: true,
  singles: true, // of the curves
  text: "",
  picked: new Map(),
  hidden: new Set(), // which runs, which points
  sort: { column: null, up: true },
  key: null,
  run: "points",
  reference: "",
  step: null,
};

const byId = (id) => document.getElementById(id);

/** Make an element: make("td", {class: "number"}, "text", child, ...). */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** Put children in the place of what an element had, unless they are the same as last time: focus and scroll stay. */
function fill(element, sameAs, build) {
  const signature = JSON.stringify(sameAs);
  if (element.signature === signature) return;
  element.signature = signature;
  element.replaceChildren(...build());
}

/** A string that Plotly shows as it is. */
const plain = (text) => String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

const distinct = (values) => [...new Map(values.map((value) => [JSON.stringify(value), value])).values()];
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const count = (number) => (isNumber(number) ? number.toLocaleString("en-US", { maximumFractionDigits: 0 }) : "–");
const fixed = (number, digits = 4) => (isNumber(number) ? number.toFixed(digits) : "–");
const short = (key) => key.split(".").at(-1);

/** A large number with four digits and a letter: 1.843M. */
function compact(number) {
  if (!isNumber(number)) return "–";
  return Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 4 }).format(number);
}

/** A number of a configuration or a table: 0.001, 3e-05, 1,200. */
function value(any) {
  if (any === null || any === undefined) return "–";
  if (!isNumber(any)) return String(any);
  if (Number.isInteger(any) && Math.abs(any) < 1e15) return any.toLocaleString("en-US");
  return Math.abs(any) >= 1e-4 && Math.abs(any) < 1e6
    ? String(+any.toPrecision(6))
    : any.toExponential().replace("+", "");
}

/** 3:25:07. */
function clock(seconds) {
  if (!isNumber(seconds)) return "–";
  const whole = Math.round(seconds);
  const two = (number) => String(number).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

/** What a run is called in a title: its name, and what was varied. */
const called = (run) => (DATA.points.length > 1 ? `${run.name} · ${DATA.points[run.point]}` : run.name);

/** Tokens that a run has seen. */
function tokensOf(run) {
  const last = Object.values(run.series).map((curve) => curve.tokens.at(-1) ?? 0);
  return run.state?.tokens || Math.max(0, ...last);
}

/** A colour of the style sheet, as it is in the mode (light or dark) of the moment. */
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

// What tells apart in either mode, to people who see all colours and to those who do not; dashes after the sixth.
const DASHES = ["solid", "dash", "dot", "dashdot"];
const COLOURS = 6;

/** Scales from low (0) to high (1) after plasma (van der Walt and Smith 2015), without what a ground would swallow. */
const SCALES = {
  light: ["#0d0887", "#6a00a8", "#b12a90", "#d8576b", "#e0702f"],
  dark: ["#b450c8", "#d8576b", "#ed7953", "#fdb42f", "#f0f921"],
};

function onScale(share) {
  const scale = SCALES[isDark() ? "dark" : "light"];
  const place = Math.min(1, Math.max(0, share)) * (scale.length - 1);
  const low = Math.min(scale.length - 2, Math.floor(place));
  const channel = (hex, at) => parseInt(hex.slice(at, at + 2), 16);
  const mixed = [1, 3, 5].map((at) => {
    const [from, to] = [channel(scale[low], at), channel(scale[low + 1], at)];
    return Math.round(from + (to - from) * (place - low))
      .toString(16)
      .padStart(2, "0");
  });
  return `#${mixed.join("")}`;
}

/** The key, if there is one alone, whose numbers put the points in an order that colours can follow. */
function orderedKey() {
  const numeric = DATA.varied.filter((key) => distinct(DATA.runs.map((run) => run.varied[key])).length > 1);
  if (numeric.length !== 1 || !DATA.runs.every((run) => isNumber(run.varied[numeric[0]]))) return null;
  return distinct(DATA.runs.map((run) => run.varied[numeric[0]])).length > 3 ? numeric[0] : null;
}

const LOOKS = new Map(); // as they are in this mode; emptied before everything is drawn

/** Colour and dash of a point. */
function look(point) {
  if (!LOOKS.has(point)) LOOKS.set(point, newLook(point));
  return LOOKS.get(point);
}

function newLook(point) {
  const key = orderedKey();
  if (key !== null) {
    const order = distinct(DATA.runs.map((run) => run.varied[key])).sort((a, b) => a - b);
    const own = DATA.runs.find((run) => run.point === point).varied[key];
    return { colour: onScale(order.indexOf(own) / (order.length - 1)), dash: "solid" };
  }
  if (DATA.points.length > COLOURS * DASHES.length) return { colour: onScale(rank(point)), dash: "solid" };
  return { colour: colour(`c${point % COLOURS}`), dash: DASHES[Math.floor(point / COLOURS) % DASHES.length] };
}

/** Where a point stands among all by its lowest value: the worst at 0, the best at 1. */
function rank(point) {
  const lowest = new Map();
  for (const run of DATA.runs) {
    const own = run.best?.value ?? Infinity;
    lowest.set(run.point, Math.min(lowest.get(run.point) ?? Infinity, own));
  }
  const worse = [...lowest.values()].filter((other) => other > lowest.get(point)).length;
  return worse / (lowest.size - 1);
}

/** The colour with so much of it left. */
const faded = (hex, alpha) =>
  hex +
  Math.round(alpha * 255)
    .toString(16)
    .padStart(2, "0");

/** The layout of a chart that has a legend of its own, below it; with too many entries there is none. */
function legendBelow(id, entries, height) {
  if (entries < 2 || entries > 12) return { height };
  const rows = Math.ceil(entries / Math.max(1, Math.floor(byId(id).clientWidth / 240)));
  const legend = { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" };
  return { height: height + 22 * rows, margin: { l: 52, r: 12, t: 10, b: 56 + 22 * rows }, showlegend: true, legend };
}

/** Draw a chart anew, keeping the reader's zoom for as long as ``kept`` is the same. */
function draw(id, traces, layout, kept) {
  const element = byId(id);
  const axis = {
    gridcolor: colour("grid"),
    zerolinecolor: colour("grid"),
    linecolor: colour("line"),
    automargin: true,
    exponentformat: "B",
    title: { standoff: 8 },
  };
  const base = {
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12, color: colour("text") },
    margin: { l: 52, r: 12, t: 10, b: 42 },
    hovermode: "closest",
    uirevision: kept,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    hoverlabel: {
      bgcolor: colour("card"),
      bordercolor: colour("line"),
      font: { color: colour("text") },
      align: "left",
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("muted"), activecolor: colour("accent") },
    ...layout,
    xaxis: { ...axis, ...layout.xaxis, title: { ...axis.title, ...layout.xaxis?.title } },
    yaxis: { ...axis, ...layout.yaxis, title: { ...axis.title, ...layout.yaxis?.title } },
  };
  const options = {
    responsive: true,
    displaylogo: false,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
  };
  element.setAttribute("role", "img");
  return Plotly.react(element, traces, base, options);
}
