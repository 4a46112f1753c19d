"use strict";
/* Shared by all parts of the page: the data, the user's selection, elements, number formats, colors.
   Strings of runs are inserted as text (textContent), never as HTML. Plotly interprets some HTML, so it gets them escaped by plain(). */

let DATA = JSON.parse(document.getElementById("data").textContent);

const CHOSEN = {
  axis: "tokens",
  logX: false,
  logY: false,
  whole: false,
  train: true,
  val: true,
  singles: true, // whether the curve of each seed is drawn
  text: "",
  picked: new Map(),
  hidden: new Set(), // points hidden in the legend
  sort: { column: null, up: true },
  key: null,
  run: "points",
  reference: "",
  step: null,
};

const byId = (id) => document.getElementById(id);

/** Creates an element: make("td", {class: "number"}, "text", child, ...). */
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

/** Replaces the children of an element, unless sameAs is unchanged, which keeps focus and scroll position. */
function fill(element, sameAs, build) {
  const signature = JSON.stringify(sameAs);
  if (element.signature === signature) return;
  element.signature = signature;
  element.replaceChildren(...build());
}

/** Escapes a string for Plotly: its tags, and the braces of its templates. */
const plain = (text) =>
  String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;").replaceAll("{", "&#123;");

const distinct = (values) => [...new Map(values.map((value) => [JSON.stringify(value), value])).values()];
const isNumber = (value) => typeof value === "number" && Number.isFinite(value);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;
const plural = (number, word) => `${count(number)} ${word}${number === 1 ? "" : "s"}`;
const count = (number) => (isNumber(number) ? number.toLocaleString("en-US", { maximumFractionDigits: 0 }) : "–");
const fixed = (number, digits = 4) => (isNumber(number) ? number.toFixed(digits) : "–");
const short = (key) => key.split(".").at(-1);

/** Formats a large number with four digits and a unit: 1.843M. */
function compact(number) {
  if (!isNumber(number)) return "–";
  return Intl.NumberFormat("en-US", { notation: "compact", maximumSignificantDigits: 4 }).format(number);
}

/** Formats a value of a configuration or a table: 0.001, 3e-05, 1,200. */
function value(any) {
  if (any === null || any === undefined) return "–";
  if (!isNumber(any)) return String(any);
  if (Number.isInteger(any) && Math.abs(any) < 1e15) return any.toLocaleString("en-US");
  return Math.abs(any) >= 1e-4 && Math.abs(any) < 1e6
    ? String(+any.toPrecision(6))
    : any.toExponential().replace("+", "");
}

/** Formats seconds: 3:25:07. */
function clock(seconds) {
  if (!isNumber(seconds)) return "–";
  const whole = Math.round(seconds);
  const two = (number) => String(number).padStart(2, "0");
  return `${Math.floor(whole / 3600)}:${two(Math.floor(whole / 60) % 60)}:${two(whole % 60)}`;
}

/** Title of a run: its name and, if there are several, its point. */
const titleOf = (run) => (DATA.points.length > 1 ? `${run.name} · ${DATA.points[run.point]}` : run.name);

/** Number of tokens that a run has seen. */
function tokensOf(run) {
  const last = Object.values(run.series).map((curve) => curve.tokens.at(-1) ?? 0);
  return run.state?.tokens || Math.max(0, ...last);
}

/** A color of the style sheet in the current mode (light or dark). */
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const isDark = () => matchMedia("(prefers-color-scheme: dark)").matches;

// Points are distinguished by colors, which suit both modes and color blindness, and by dashes after the sixth.
const DASHES = ["solid", "dash", "dot", "dashdot"];
const COLORS = 6;

/** Color scales from low (0) to high (1) after plasma (van der Walt and Smith 2015), without shades close to the background. */
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

/** The only varied key, if its values are numbers and a color scale can show their order; otherwise null. */
function orderedKey() {
  const numeric = DATA.varied.filter((key) => distinct(DATA.runs.map((run) => run.varied[key])).length > 1);
  if (numeric.length !== 1 || !DATA.runs.every((run) => isNumber(run.varied[numeric[0]]))) return null;
  return distinct(DATA.runs.map((run) => run.varied[numeric[0]])).length > 3 ? numeric[0] : null;
}

const LOOKS = new Map(); // cache for the current mode, cleared before each rendering

/** Color and dash of a point. */
function look(point) {
  if (!LOOKS.has(point)) LOOKS.set(point, newLook(point));
  return LOOKS.get(point);
}

function newLook(point) {
  const key = orderedKey();
  if (key !== null) {
    const order = distinct(DATA.runs.map((run) => run.varied[key])).sort((a, b) => a - b);
    const own = DATA.runs.find((run) => run.point === point).varied[key];
    return { color: onScale(order.indexOf(own) / (order.length - 1)), dash: "solid" };
  }
  if (DATA.points.length > COLORS * DASHES.length) return { color: onScale(rank(point)), dash: "solid" };
  return { color: color(`c${point % COLORS}`), dash: DASHES[Math.floor(point / COLORS) % DASHES.length] };
}

/** Whether a value of the metric is better than another one. */
const isBetter = (a, b) => (DATA.maximized ? a > b : a < b);

/** Which of several values of the metric is the best one. */
const extreme = () => (DATA.maximized ? "highest" : "lowest");

/** Rank of a point by its best value: 0 for the worst, 1 for the best. */
function rank(point) {
  const best = new Map(DATA.points.map((_, i) => [i, DATA.maximized ? -Infinity : Infinity]));
  for (const run of comparable(DATA.runs))
    if (isBetter(valueOf(run), best.get(run.point))) best.set(run.point, valueOf(run));
  const worse = [...best.values()].filter((other) => isBetter(best.get(point), other)).length;
  return worse / (best.size - 1);
}

/** The color with an opacity. */
const faded = (hex, alpha) =>
  hex +
  Math.round(alpha * 255)
    .toString(16)
    .padStart(2, "0");

const TOOLBAR = 36; // height of Plotly's toolbar, which is above the curves

/** Layout of a chart with its own legend below it, which is omitted if there are too many entries. */
function legendBelow(id, entries, height) {
  if (entries < 2 || entries > 12) return { height };
  const rows = Math.ceil(entries / Math.max(1, Math.floor(byId(id).clientWidth / 240)));
  const legend = { orientation: "h", x: 0, y: 0, yref: "container", yanchor: "bottom" };
  return { height: height + 22 * rows, margin: { l: 52, r: 12, t: TOOLBAR, b: 56 + 22 * rows }, showlegend: true, legend };
}

/** Draws a chart, and keeps the user's zoom as long as ``kept`` is unchanged. */
function draw(id, traces, layout, kept) {
  const element = byId(id);
  const axis = {
    gridcolor: color("grid"),
    zerolinecolor: color("grid"),
    linecolor: color("line"),
    automargin: true,
    exponentformat: "B",
    title: { standoff: 8 },
  };
  const base = {
    autosize: true,
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    showlegend: false,
    font: { family: "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", size: 12, color: color("text") },
    margin: { l: 52, r: 12, t: TOOLBAR, b: 42 },
    hovermode: "closest",
    uirevision: kept,
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    hoverlabel: {
      bgcolor: color("card"),
      bordercolor: color("line"),
      font: { color: color("text") },
      align: "left",
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: color("muted"), activecolor: color("accent") },
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
