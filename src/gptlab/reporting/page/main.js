/* Draws everything; anew when the reader chooses, when day turns to night, and when the runs have gone on. */

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
    `${plural(DATA.runs.length, "run")} found at ${DATA.where}. Everything is in this page: it loads nothing.`,
    `A run's value is its lowest ${DATA.metric}, nats a token where that is a loss; runs that failed, diverged or ` +
      "were pruned have none in the charts of what was varied.",
    "FLOPs are tokens × FLOPs a token of the configuration's model; time is the sum of tokens / tokens_per_second, " +
      "which is training alone.",
  ];
  if (DATA.thinned)
    notes.push(
      `Long curves are thinned: at most ${count(DATA.points_a_curve)} points each (fewer where there are more than ` +
        "30 runs), with the lowest and the highest of every stretch. metrics.csv has all.",
    );
  if (DATA.poll) notes.push(`While it is open the page asks for news every ${DATA.poll} s.`);
  fill(byId("notes"), notes, () => notes.map((note) => make("li", {}, note)));
}

/** Ask the server for news, again and again; the reader's choices and zooms stay. */
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
      tell(status, "on", `live · ${new Date().toLocaleTimeString()}`);
    } catch (error) {
      tell(status, "off", error instanceof TypeError ? "the server has ended: this is what there was" : error.message);
    }
    await new Promise((resolve) => setTimeout(resolve, DATA.poll * 1000));
  }
}

function tell(status, kind, text) {
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
  if (innerWidth === width) return; // a phone's bar of addresses comes and goes
  width = innerWidth;
  requestAnimationFrame(render);
});
if (DATA.poll) follow();
