/* Charts of the loss and of all other metrics in metrics.csv. */

const TITLES = {
  "val/bits_per_byte": "Val bits per byte",
  tokens_per_second: "Throughput, tokens per second",
  peak_memory_gb: "Peak memory, GB",
  grad_norm: "Gradient norm",
  lr: "Learning rate",
  data_wait: "Fraction of time waiting for data",
  mfu: "Model FLOPs utilization",
  bad_steps: "Skipped steps (non-finite gradient)",
  loss_spikes: "Loss spikes",
};
const LOSSES = { train: { width: 1.2, faint: 0.25, alpha: 0.6 }, val: { width: 2.4, markers: true } };

function renderLoss() {
  const drawn = Object.keys(LOSSES)
    .filter((part) => CHOSEN[part])
    .flatMap((part) => traces(`${part}/loss`, LOSSES[part]));
  const range = frame(drawn, CHOSEN.logY);
  const layout = {
    xaxis: xAxis(),
    yaxis: { title: { text: "loss, nats per token" }, type: CHOSEN.logY ? "log" : "linear", ...(range ? { range } : {}) },
  };
  draw("loss", drawn, layout, `${CHOSEN.axis} ${CHOSEN.logX} ${CHOSEN.logY} ${CHOSEN.whole}`);
  byId("loss").setAttribute(
    "aria-label",
    `Loss over ${AXES[CHOSEN.axis].label} of ${plural(shownRuns().length, "run")}; the table of runs has the lowest values`,
  );
  byId("loss-caption").textContent = lossCaption(drawn, range);
}

const FEW = 10; // values of a curve that are all in the visible range

/** Range of the values after the first tenth of each curve, which would flatten the rest; null for the whole range. */
function frame(drawn, isLog = false) {
  if (CHOSEN.whole || CHOSEN.logX || isLog) return null;
  let [low, high, highest] = [Infinity, -Infinity, -Infinity];
  for (const { x, y } of drawn) {
    const [first, last] = [x[0], x.reduce((a, b) => Math.max(a, b ?? a), x[0])];
    y.forEach((loss, i) => {
      if (loss === null) return;
      [low, highest] = [Math.min(low, loss), Math.max(highest, loss)];
      if (x.length < FEW || x[i] >= first + (last - first) / 10) high = Math.max(high, loss);
    });
  }
  if (!(high > low) || high >= highest) return null;
  return [low - 0.05 * (high - low), high + 0.08 * (high - low)];
}

function lossCaption(drawn, range) {
  const sentences = [];
  if (CHOSEN.val && CHOSEN.train) sentences.push("Thick: val. Thin: train.");
  if (drawn.some((trace) => trace.meta.kind === "band")) {
    sentences.push(
      "Runs that differ only in the seed are drawn as their mean, with a band from the lowest to the highest value, " +
        "at the steps that all of them have. Runs that failed, diverged, blew up or were pruned are excluded from means.",
    );
  }
  if (orderedKey() === null && DATA.points.length > COLORS * DASHES.length) {
    sentences.push(`There are too many points for separate colors: points are colored by their ${extreme()} ${DATA.metric}.`);
  }
  if (CHOSEN.axis === "time")
    sentences.push(
      "Time is training only: the sum of tokens / tokens_per_second. " +
        "It excludes evaluations, samples and checkpoints.",
    );
  if (CHOSEN.axis === "flops") {
    sentences.push("FLOPs per token, forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).");
    const unknown = shownRuns().filter((run) => run.flops === null).length;
    if (unknown)
      sentences.push(`${plural(unknown, "run")} whose model configuration cannot be read ${unknown === 1 ? "is" : "are"} not drawn.`);
  }
  if (range) sentences.push("The first tenth may be above the visible range: double-click, or check “full y range”, to show it.");
  if (!drawn.length) sentences.push("No data: none of the shown runs has a loss yet.");
  return sentences.join(" ");
}

/** All metrics except the losses; those with a title come first. */
function otherMetrics() {
  const there = new Set(DATA.runs.flatMap((run) => Object.keys(run.series)));
  const known = Object.keys(TITLES).filter((metric) => there.has(metric));
  return [
    ...known,
    ...[...there].filter((metric) => !(metric in TITLES) && !/^(train|val)\/loss$/.test(metric)).sort(),
  ];
}

function renderTraining() {
  const metrics = otherMetrics();
  byId("training-section").hidden = !metrics.length;
  fill(byId("training"), metrics, () =>
    metrics.map((metric, i) =>
      make(
        "figure",
        {},
        make("h3", {}, TITLES[metric] ?? metric),
        make("div", { id: `metric-${i}`, class: "chart small", "data-metric": metric }),
      ),
    ),
  );
  metrics.forEach((metric, i) => {
    const drawn = traces(metric, { width: 1.6, markers: metric.startsWith("val/") });
    const isFromZero = metric === "tokens_per_second" || metric === "peak_memory_gb";
    const range = isFromZero ? null : frame(drawn);
    const layout = {
      xaxis: xAxis(),
      yaxis: { rangemode: isFromZero ? "tozero" : "normal", ...(range ? { range } : {}) },
    };
    draw(`metric-${i}`, drawn, layout, `${CHOSEN.axis} ${CHOSEN.logX} ${CHOSEN.whole}`);
    byId(`metric-${i}`).setAttribute("aria-label", `${TITLES[metric] ?? metric} over ${AXES[CHOSEN.axis].label}`);
  });
  byId("training-caption").textContent =
    "Over the axis selected for the loss. The first tenth may be above the visible range. " +
    "Throughput is that of training only. " +
    "Memory is that of the GPU or, on a CPU, of the process.";
}

function buildAxisControls() {
  for (const [name, axis] of Object.entries(AXES)) {
    const radio = make("input", {
      type: "radio",
      name: "axis",
      value: name,
      onchange: () => {
        CHOSEN.axis = name;
        render();
      },
    });
    radio.checked = CHOSEN.axis === name;
    byId("axis").append(make("label", {}, radio, axis.label));
  }
  const switches = {
    val: "val",
    train: "train",
    singles: "individual seeds",
    logX: "log x",
    logY: "log y",
    whole: "full y range",
  };
  for (const [name, label] of Object.entries(switches)) {
    const box = make("input", {
      type: "checkbox",
      "data-part": name,
      onchange: (event) => {
        CHOSEN[name] = event.target.checked;
        render();
      },
    });
    box.checked = CHOSEN[name];
    byId("parts").append(make("label", {}, box, label));
  }
}
