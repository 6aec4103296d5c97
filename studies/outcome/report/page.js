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

// Apply the filters to all charts and to the table of trials.
function show() {
  const filters = [...form.querySelectorAll("select")].map((select) => [select.name, select.value]);
  for (const view of views) {
    const signals = view.getState({ signals: () => true, data: () => false }).signals;
    for (const [name, value] of filters) if (name in signals) view.signal(name, value);
    view.run();
  }
  for (const row of rows)
    row.hidden = filters.some(
      ([name, value]) => value !== "all" && row.dataset[name.replace("filter_", "")] !== value,
    );
  const shown = rows.filter((row) => !row.hidden).length;
  document.getElementById("count").value = `${shown} of ${rows.length} trials`;
}

if (form) {
  form.addEventListener("change", show);
  form.addEventListener("reset", () => setTimeout(show));
  show(); // Browsers may restore the selected filters when the page is reloaded.
}

const theme = document.getElementById("theme");
const dark = matchMedia("(prefers-color-scheme: dark)");

function updateThemeButton() {
  const current = document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light");
  theme.setAttribute("aria-pressed", String(current === "dark"));
  return current;
}

theme.addEventListener("click", () => {
  document.documentElement.dataset.theme = updateThemeButton() === "dark" ? "light" : "dark";
  updateThemeButton();
});
dark.addEventListener("change", updateThemeButton);
updateThemeButton();

addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
document.documentElement.dataset.drawn = String(views.length);
