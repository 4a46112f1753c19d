/* The loss, and under it whatever else is in metrics.csv. */

const TITLES = {
  "val/bits_per_byte": "Bits per byte of val",
  tokens_per_second: "Throughput, tokens a second",
  peak_memory_gb: "Peak memory, GB",
  grad_norm: "Gradient norm",
  lr: "Learning rate",
  data_wait: "Share of the time that waits for data",
  mfu: "Model FLOPs utilisation",
  bad_steps: "Steps skipped for their gradient",
  loss_spikes: "Spikes of the loss",
};
const LOSSES = { train: { width: 1.2, faint: 0.25, alpha: 0.6 }, val: { width: 2.4, markers: true } };

function renderLoss() {
  const drawn = Object.keys(LOSSES)
    .filter((part) => CHOSEN[part])
    .flatMap((part) => traces(`${part}/loss`, LOSSES[part]));
  const range = frame(drawn);
  const layout = {
    xaxis: xAxis(),
    yaxis: { title: { text: "loss, nats a token" }, type: CHOSEN.logY ? "log" : "linear", ...(range ? { range } : {}) },
  };
  draw("loss", drawn, layout, `${CHOSEN.axis} ${CHOSEN.logX} ${CHOSEN.logY} ${CHOSEN.whole}`);
  byId("loss").setAttribute(
    "aria-label",
    `Loss over ${AXES[CHOSEN.axis].label} of ${plural(shownRuns().length, "run")}; the table of runs has the lowest`,
  );
  byId("loss-caption").textContent = lossCaption(drawn, range);
}

/** Where the loss is after the first tenth of each curve: what comes before makes all else flat. Null: all of it. */
function frame(drawn) {
  if (CHOSEN.whole || CHOSEN.logX || CHOSEN.logY) return null;
  let [low, high, highest] = [Infinity, -Infinity, -Infinity];
  for (const { x, y } of drawn) {
    const [first, last] = [x[0], x.reduce((a, b) => Math.max(a, b ?? a), x[0])];
    y.forEach((loss, i) => {
      if (loss === null) return;
      [low, highest] = [Math.min(low, loss), Math.max(highest, loss)];
      if (x[i] >= first + (last - first) / 10) high = Math.max(high, loss);
    });
  }
  if (!(high > low) || high >= highest) return null;
  return [low - 0.05 * (high - low), high + 0.08 * (high - low)];
}

function lossCaption(drawn, range) {
  const said = [];
  if (CHOSEN.val && CHOSEN.train) said.push("Thick: val. Thin: train.");
  if (drawn.some((trace) => trace.meta.kind === "band")) {
    said.push(
      "Runs that differ in the seed alone are one line, their mean; the band is from the lowest to the highest, " +
        "as far as all of them have come. Runs that failed, diverged or were pruned are in no mean.",
    );
  }
  if (orderedKey() === null && DATA.points.length > COLOURS * DASHES.length) {
    said.push(`So many points have no colour each: theirs goes by their lowest ${DATA.metric}.`);
  }
  if (CHOSEN.axis === "time")
    said.push(
      "Time is that of training alone: the sum of tokens / tokens_per_second. " +
        "Evaluations, samples and checkpoints do not count.",
    );
  if (CHOSEN.axis === "flops") {
    said.push("FLOPs a token, forward and backward: 6 N + 12 L C T (Chowdhery et al. 2022, appendix B).");
    const unknown = shownRuns().filter((run) => run.flops === null).length;
    if (unknown)
      said.push(`${plural(unknown, "run")} whose model cannot be read ${unknown === 1 ? "is" : "are"} not drawn.`);
  }
  if (range) said.push("The first tenth may begin above the frame: a double click, or “all of y”, shows it.");
  if (!drawn.length) said.push("Nothing to draw: no run that is shown has a loss yet.");
  return said.join(" ");
}

/** All metrics but the losses, those with a title first. */
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
    const layout = {
      xaxis: xAxis(),
      yaxis: { rangemode: metric === "tokens_per_second" || metric === "peak_memory_gb" ? "tozero" : "normal" },
    };
    draw(
      `metric-${i}`,
      traces(metric, { width: 1.6, markers: metric.startsWith("val/") }),
      layout,
      `${CHOSEN.axis} ${CHOSEN.logX}`,
    );
    byId(`metric-${i}`).setAttribute("aria-label", `${TITLES[metric] ?? metric} over ${AXES[CHOSEN.axis].label}`);
  });
  byId("training-caption").textContent =
    "Over the axis that is chosen for the loss. Throughput is that of training alone; " +
    "memory is the GPU's, or on a CPU the process's.";
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
    singles: "single seeds",
    logX: "log x",
    logY: "log y",
    whole: "all of y",
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
