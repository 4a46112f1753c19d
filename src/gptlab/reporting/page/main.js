/* Renders the page; again on user input, on a change between light and dark mode, and on new data. */

function render() {
  LOOKS.clear();
  renderFilters();
  renderLoss();
  renderVaried();
  renderScaling();
  renderRuns();
  renderTraining();
  renderSamples();
  renderConfig();
  renderEnvironment();
}

function renderAll() {
  LOOKS.clear();
  renderHeader();
  renderAnswers();
  renderNotes();
  render();
}

function renderNotes() {
  const notes = [
    `${plural(DATA.runs.length, "run")} found at ${DATA.where}. This page contains all data and loads no external resources.`,
    `The value of a run is its ${extreme()} ${DATA.metric}, in nats per token if that is a loss. Runs that failed, diverged, ` +
      "blew up or were pruned are excluded from comparisons.",
    "FLOPs are tokens × FLOPs per token of the configured model. Time is the sum of tokens / tokens_per_second, which " +
      "is training only.",
  ];
  if (DATA.thinned)
    notes.push(
      `Long curves are downsampled to at most ${count(DATA.points_a_curve)} points (fewer if there are more than 30 ` +
        "runs), which include the lowest and the highest value of every segment. Means and ranges over seeds are those " +
        "of the values at equal steps. metrics.csv has all values.",
    );
  if (DATA.poll) notes.push(`While the page is open, it requests new data every ${DATA.poll} s.`);
  fill(byId("notes"), notes, () => notes.map((note) => make("li", {}, note)));
}

/** Polls the server for new data; the user's selection and zoom are kept. */
async function follow() {
  const status = byId("live");
  status.hidden = false;
  let tag = null;
  for (;;) {
    try {
      const answer = await fetch("data.json", { cache: "no-store", headers: tag ? { "If-None-Match": tag } : {} });
      if (answer.status === 200) {
        tag = answer.headers.get("ETag");
        DATA = await answer.json();
        renderAll();
      } else if (answer.status !== 304) throw new Error(await answer.text());
      showStatus(status, "on", `live · ${new Date().toLocaleTimeString()}`);
    } catch (error) {
      showStatus(status, "off", error instanceof TypeError ? "the server has stopped; showing the last data" : error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, DATA.poll * 1000));
  }
}

function showStatus(status, kind, text) {
  status.className = kind;
  status.textContent = text;
}

buildAxisControls();
listenToFilters();
listenToSamples();
byId("reference").addEventListener("change", (event) => {
  CHOSEN.reference = event.target.value;
  renderConfig();
});
renderAll();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", renderAll);
let width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return; // the address bar of a phone appears and disappears
  width = innerWidth;
  requestAnimationFrame(render);
});
if (DATA.poll) follow();
