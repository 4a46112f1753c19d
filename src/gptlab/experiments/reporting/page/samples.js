/* What the runs wrote, as it was at a step. */

const MOST_CARDS = 24; // texts at a time

const sampleSteps = () => distinct(DATA.runs.flatMap((run) => run.samples.map(([step]) => step))).sort((a, b) => a - b);

function renderSamples() {
  const steps = sampleSteps();
  byId("samples-section").hidden = !steps.length;
  if (!steps.length) return;
  const writers = shownRuns().filter((run) => run.samples.length);
  fill(
    byId("sample-run"),
    writers.map((run) => run.name),
    () => [
      make("option", { value: "" }, "all that are shown"),
      ...writers.map((run) => make("option", { value: run.id }, run.name)),
    ],
  );
  if (!writers.some((run) => String(run.id) === CHOSEN.run)) CHOSEN.run = "";
  byId("sample-run").value = CHOSEN.run;
  const slider = byId("sample-step");
  slider.max = steps.length - 1;
  const place =
    CHOSEN.step === null
      ? steps.length - 1
      : Math.max(
          0,
          steps.findLastIndex((step) => step <= CHOSEN.step),
        );
  slider.value = place;
  slider.setAttribute("aria-valuetext", `step ${steps[place]}`);
  byId("sample-at").textContent = count(steps[place]);
  const chosen = writers.filter((run) => CHOSEN.run === "" || String(run.id) === CHOSEN.run);
  const cards = chosen
    .map((run) => [run, run.samples.findLast(([step]) => step <= steps[place])])
    .filter(([, sample]) => sample);
  fill(
    byId("samples"),
    cards.map(([run, sample]) => [run.name, run.point, sample, isDark()]),
    () =>
      cards.slice(0, MOST_CARDS).map(([run, [step, text]]) => {
        const dot = make("span", { class: "dot" });
        dot.style.background = look(run.point).colour;
        return make(
          "div",
          { class: "card sample" },
          make("h3", {}, dot, `${run.name} · step ${count(step)}`),
          make("pre", { tabindex: "0" }, text.trimEnd()),
        );
      }),
  );
  const left = cards.length - MOST_CARDS;
  byId("samples-caption").textContent =
    left > 0
      ? `${plural(left, "run")} more: filter, or choose one.`
      : cards.length
        ? ""
        : "None of the runs that are shown had written so early.";
}

function listenToSamples() {
  byId("sample-step").addEventListener("input", (event) => {
    const steps = sampleSteps();
    const place = Number(event.target.value);
    CHOSEN.step = place === steps.length - 1 ? null : steps[place]; // the last goes on with the runs
    renderSamples();
  });
  byId("sample-run").addEventListener("change", (event) => {
    CHOSEN.run = event.target.value;
    renderSamples();
  });
}
