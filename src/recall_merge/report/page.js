const narrowed = (spec, room) => ({
  ...spec,
  ...(typeof spec.width === "number" && { width: Math.max(100, Math.min(spec.width, room)) }),
  ...(spec.vconcat && { vconcat: spec.vconcat.map((part) => narrowed(part, room)) }),
});
const put = (box, spec) => vegaEmbed(box, spec, { renderer: "svg", actions: false, ast: true, tooltip: { theme: "custom" } });
async function draw() {
  for (const data of document.querySelectorAll("script.chart")) {
    const spec = JSON.parse(data.textContent), box = data.previousElementSibling, room = box.clientWidth;
    const set = [...box.querySelectorAll("form input")].map((input) => input.value);
    if (room < 500) {
      Object.assign(spec.config.legend, { columns: 2, labelLimit: 135, titleLimit: 240 });
      spec.config.axis.labelLimit = 140;
    }
    if (!spec.vconcat) spec.autosize = { type: "fit-x", contains: "padding" };
    const over = () => box.querySelector("svg").width.baseVal.value - room; // what stands beside the plots is known once they are drawn
    let drawn;
    for (const columns of [spec.config.legend.columns, 1]) {
      spec.config.legend.columns = columns;
      drawn = await put(box, narrowed(spec, room));
      if (over() > 0) drawn = await put(box, narrowed(spec, Math.min(room, (spec.vconcat?.[0] ?? spec).width) - over() - 4));
      if (over() <= 0) break;
    }
    box.querySelectorAll("form input").forEach((input, at) => {
      if (set.length) input.value = set[at], input.dispatchEvent(new Event("input"));
    });
    box.view = drawn.view;
    box.dataset.drawn = "yes";
  }
}
let waiting, width = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === width) return;
  width = innerWidth;
  clearTimeout(waiting);
  waiting = setTimeout(draw, 200);
});
draw();
