/* What the runs wrote, as it was at a step. */

const MOST_CARDS = 24; // texts at a time
const FIRSTS = "points"; // the choice of one run of each point

const sampleSteps = () => distinct(DATA.runs.flatMap((run) => run.samples.map(([step]) => step))).sort((a, b) => a - b);

function renderSamples() {
  const steps = sampleSteps();
  byId("samples-section").hidden = !steps.length;
  if (!steps.length) return;
  const writers = shownRuns().filter((run) => run.samples.length);
  fill(byId("sample-run"), writers.map(called), () => [
    make("option", { value: FIRSTS }, "one of each point"),
    make("option", { value: "" }, "all that are shown"),
    ...writers.map((run) => make("option", { value: run.id }, called(run))),
  ]);
  if (CHOSEN.run !== "" && !writers.some((run) => String(run.id) === CHOSEN.run)) CHOSEN.run = FIRSTS;
  byId("sample-run").value = CHOSEN.run;
  const slider = byId("sample-step");
  slider.max = steps.length - 1;
  const earlier = steps.findLastIndex((step) => step <= (CHOSEN.step ?? Infinity));
  const place = Math.max(0, earlier);
  slider.value = place;
  slider.setAttribute("aria-valuetext", `step ${steps[place]}`);
  byId("sample-at").textContent = count(steps[place]);
  const isFirst = (run) => run === writers.find((other) => other.point === run.point);
  const isChosen = (run) => (CHOSEN.run === FIRSTS ? isFirst(run) : CHOSEN.run === "" || String(run.id) === CHOSEN.run);
  const chosen = writers.filter(isChosen);
  const found = chosen.map((run) => [run, run.samples.findLast(([step]) => step <= steps[place])]);
  renderCards(found.filter(([, sample]) => sample));
}

function renderCards(cards) {
  const signature = cards.map(([run, sample]) => [called(run), look(run.point), sample]);
  fill(byId("samples"), signature, () =>
    cards.slice(0, MOST_CARDS).map(([run, [step, text]]) => {
      const dot = make("span", { class: "dot" });
      dot.style.background = look(run.point).colour;
      const title = make("h3", {}, dot, `${called(run)} · step ${count(step)}`);
      return make("div", { class: "card sample" }, title, make("pre", { tabindex: "0" }, text.trimEnd()));
    }),
  );
  const left = cards.length - MOST_CARDS;
  const none = cards.length ? "" : "None of the runs that are shown had written so early.";
  byId("samples-caption").textContent = left > 0 ? `${plural(left, "run")} more: filter, or choose one.` : none;
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
