/* All that was varied at once, as parallel coordinates. */

/** Parallel coordinates, a row a setting and the loss as the last; a line a point, coloured by its loss. */
function renderParallel(keys) {
  const points = valuedPoints().sort((a, b) => b.mean - a.mean); // the best on top
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
    const own = onScale(1 - (point.mean - lowest) / range);
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
      gridcolor: colour("line"),
      showline: false,
      zeroline: false,
    },
    annotations: rows.flatMap((row, i) => [nameOf(row, i), ...ticksOf(row, i)]),
  };
  draw("parallel", drawn, layout, "parallel");
  byId("parallel").setAttribute("aria-label", `Parallel coordinates of ${keys.join(", ")} and ${DATA.metric}`);
  byId("parallel-caption").textContent =
    `A row for each setting that was varied, and ${DATA.metric} as the last: there, lower is further left. ` +
    "One line a point, the mean of its seeds, coloured by that loss.";
}

/** Where on its row a value stands, from 0 to 1. */
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
  bgcolor: colour("card"),
  showarrow: false,
  text: `<b>${plain(row.key)}</b>`,
  font: { color: colour("text") },
});

function ticksOf(row, i) {
  const all = row.values;
  const told = all.length <= 5 ? all : [all[0], all[Math.floor((all.length - 1) / 2)], all.at(-1)];
  return told.map((one) => {
    const x = share(row, one);
    const text = row.key === DATA.metric ? fixed(one) : value(one);
    return {
      x,
      y: i,
      xanchor: x < 0.1 ? "left" : x > 0.9 ? "right" : "center",
      yanchor: "top",
      yshift: -8,
      bgcolor: colour("card"),
      showarrow: false,
      text: plain(text.length > 14 ? `${text.slice(0, 13)}…` : text),
      font: { color: colour("muted"), size: 11 },
    };
  });
}
