const { charts, data } = JSON.parse(document.getElementById("content").textContent);

for (const image of document.querySelectorAll("img[data-picture]"))
  image.src = data.trials[Number(image.dataset.picture)].picture;

const options = {
  renderer: "svg",
  actions: { export: true, source: false, compiled: false, editor: false },
  tooltip: { theme: "custom" },
};
const views = await Promise.all(
  [...document.querySelectorAll("[data-chart]")].map(async (place) => {
    const spec = charts[place.dataset.chart];
    spec.datasets = { ...spec.datasets, ...data };
    return (await window.vegaEmbed(place, spec, options)).view;
  }),
);

const form = document.getElementById("filters");
const rows = [...document.querySelectorAll("#rows tbody tr")];

function show() {
  const wanted = [...form.querySelectorAll("select")].map((select) => [select.name, select.value]);
  for (const view of views) {
    const signals = view.getState({ signals: () => true, data: () => false }).signals;
    for (const [name, value] of wanted) if (name in signals) view.signal(name, value);
    view.run();
  }
  for (const row of rows)
    row.hidden = wanted.some(
      ([name, value]) => value !== "all" && row.dataset[name.replace("filter_", "")] !== value,
    );
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").value = `${shown} of ${rows.length} trials`;
}

if (form) {
  form.addEventListener("change", show);
  form.addEventListener("reset", () => setTimeout(show));
  show(); // A browser may remember what was chosen before the page was loaded again.
}

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");

function name() {
  const chosen = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  theme.setAttribute("aria-pressed", String(chosen === "dark"));
  return chosen;
}

theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = name() === "dark" ? "light" : "dark";
  name();
});
dark.addEventListener("change", name);
name();

addEventListener("beforeprint", () => {
  for (const each of document.querySelectorAll("details")) each.open = true;
});
document.documentElement.dataset.drawn = String(views.length);
