/* Samples of the runs at a step. */

const MOST_CARDS = 24; // samples shown at a time
const FIRSTS = "points"; // option that shows one run per point

const sampleSteps = () => distinct(DATA.runs.flatMap((run) => run.samples.map(([step]) => step))).sort((a, b) => a - b);

function renderSamples() {
  const steps = sampleSteps();
  byId("samples-section").hidden = !steps.length;
  if (!steps.length) return;
  const sampled = shownRuns().filter((run) => run.samples.length);
  fill(byId("sample-run"), sampled.map(titleOf), () => [
    make("option", { value: FIRSTS }, "one per point"),
    make("option", { value: "" }, "all shown runs"),
    ...sampled.map((run) => make("option", { value: run.id }, titleOf(run))),
  ]);
  if (CHOSEN.run !== "" && !sampled.some((run) => String(run.id) === CHOSEN.run)) CHOSEN.run = FIRSTS;
  byId("sample-run").value = CHOSEN.run;
  const slider = byId("sample-step");
  slider.max = steps.length - 1;
  const earlier = steps.findLastIndex((step) => step <= (CHOSEN.step ?? Infinity));
  const place = Math.max(0, earlier);
  slider.value = place;
  slider.setAttribute("aria-valuetext", `step ${steps[place]}`);
  byId("sample-at").textContent = count(steps[place]);
  const isFirst = (run) => run === sampled.find((other) => other.point === run.point);
  const isChosen = (run) => (CHOSEN.run === FIRSTS ? isFirst(run) : CHOSEN.run === "" || String(run.id) === CHOSEN.run);
  const chosen = sampled.filter(isChosen);
  const found = chosen.map((run) => [run, run.samples.findLast(([step]) => step <= steps[place])]);
  renderCards(found.filter(([, sample]) => sample));
}

function renderCards(cards) {
  const signature = cards.map(([run, sample]) => [titleOf(run), look(run.point), sample]);
  fill(byId("samples"), signature, () =>
    cards.slice(0, MOST_CARDS).map(([run, [step, text]]) => {
      const dot = make("span", { class: "dot" });
      dot.style.background = look(run.point).color;
      const title = make("h3", {}, dot, `${titleOf(run)} · step ${count(step)}`);
      return make("div", { class: "card sample" }, title, make("pre", { tabindex: "0" }, text.trimEnd()));
    }),
  );
  const left = cards.length - MOST_CARDS;
  const none = cards.length ? "" : "None of the shown runs has a sample up to this step.";
  byId("samples-caption").textContent = left > 0 ? `${plural(left, "more run")} not shown: filter the runs, or select one.` : none;
}

function listenToSamples() {
  byId("sample-step").addEventListener("input", (event) => {
    const steps = sampleSteps();
    const place = Number(event.target.value);
    CHOSEN.step = place === steps.length - 1 ? null : steps[place]; // at the last step, the slider follows the runs
    renderSamples();
  });
  byId("sample-run").addEventListener("change", (event) => {
    CHOSEN.run = event.target.value;
    renderSamples();
  });
}
