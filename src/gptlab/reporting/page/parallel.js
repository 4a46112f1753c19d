/* Parallel coordinates of all varied config keys. */

/** One row per config key, with the loss as the last row, and one line per point, colored by its loss. */
function renderParallel(keys) {
  const points = valuedPoints().sort((a, b) => (DATA.maximized ? a.mean - b.mean : b.mean - a.mean)); // the best on top
  const rows = keys.map((key) => ({
    key,
    ...spacing(distinct(DATA.runs.map((run) => run.varied[key]))),
    of: (point) => point.varied[key],
  }));
  const means = points.map((point) => point.mean);
  rows.push({
    key: DATA.metric,
    kind: "linear",
    values: points.length ? [Math.min(...means), Math.max(...means)] : [],
    of: (point) => point.mean,
  });
  const lowest = Math.min(...means);
  const range = Math.max(...means) - lowest || 1;
  const drawn = points.map((point) => {
    const position = (point.mean - lowest) / range;
    const own = onScale(DATA.maximized ? position : 1 - position);
    return {
      type: "scatter",
      mode: "lines+markers",
      x: rows.map((row) => share(row, row.of(point))),
      y: rows.map((_, i) => i),
      name: plain(DATA.points[point.point]),
      meta: { point: point.point, kind: "mean" },
      line: { color: own, width: 2 },
      marker: { color: own, size: 7 },
      text: rows.map((row) => `${plain(row.key)} = ${plain(value(row.of(point)))}`),
      hovertemplate: `<b>%{fullData.name}</b><br>%{text}<br>${plain(DATA.metric)} ${fixed(point.mean)}<extra></extra>`,
    };
  });
  const layout = {
    height: 70 + 90 * rows.length,
    margin: { l: 16, r: 16, t: 34, b: 30 },
    xaxis: { range: [-0.04, 1.04], visible: false, fixedrange: true },
    yaxis: {
      range: [rows.length - 0.6, -0.4],
      tickvals: rows.map((_, i) => i),
      showticklabels: false,
      fixedrange: true,
      gridcolor: color("line"),
      showline: false,
      zeroline: false,
    },
    annotations: rows.flatMap((row, i) => [nameOf(row, i), ...ticksOf(row, i)]),
  };
  draw("parallel", drawn, layout, "parallel");
  byId("parallel").setAttribute("aria-label", `Parallel coordinates of ${keys.join(", ")} and ${DATA.metric}`);
  byId("parallel-caption").textContent =
    `One row per varied config key, and ${DATA.metric} as the last row, with lower values to the left. ` +
    "One line per point, the mean of its seeds, colored by that loss.";
}

/** Position of a value on its row, from 0 to 1. */
function share(row, any) {
  if (row.kind === "category")
    return row.values.length < 2 ? 0.5 : row.values.indexOf(value(any)) / (row.values.length - 1);
  const scaled = row.kind === "log" ? Math.log : (number) => number;
  const [low, high] = [scaled(row.values[0]), scaled(row.values.at(-1))];
  return high > low ? (scaled(any) - low) / (high - low) : 0.5;
}

const nameOf = (row, i) => ({
  x: 0,
  y: i,
  xanchor: "left",
  yanchor: "bottom",
  yshift: 9,
  bgcolor: color("card"),
  showarrow: false,
  text: `<b>${plain(row.key)}</b>`,
  font: { color: color("text") },
});

function ticksOf(row, i) {
  const all = row.values;
  const ticks = all.length <= 5 ? all : [all[0], all[Math.floor((all.length - 1) / 2)], all.at(-1)];
  return ticks.map((one) => {
    const x = share(row, one);
    const text = row.key === DATA.metric ? fixed(one) : value(one);
    return {
      x,
      y: i,
      xanchor: x < 0.1 ? "left" : x > 0.9 ? "right" : "center",
      yanchor: "top",
      yshift: -8,
      bgcolor: color("card"),
      showarrow: false,
      text: plain(text.length > 14 ? `${text.slice(0, 13)}…` : text),
      font: { color: color("muted"), size: 11 },
    };
  });
}
