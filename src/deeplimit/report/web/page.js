"use strict";
(() => {
  const config = { displayModeBar: false, responsive: true, scrollZoom: false, doubleClick: false };
  const read = (id) => JSON.parse(document.getElementById(id).textContent);

  for (const div of document.querySelectorAll(".plot:not(#states)")) {
    const figure = read(`${div.id}-data`);
    Plotly.newPlot(div, figure.data, figure.layout, config);
  }

  const div = document.getElementById("states");
  if (!div) return;
  const figure = read("states-data");
  const layers = read("states-layers");
  const frames = figure.frames;
  const moving = frames[0].traces;
  const last = frames.length - 1;
  const slider = document.getElementById("layer");
  const play = document.getElementById("play");
  const calm = window.matchMedia("(prefers-reduced-motion: reduce)");
  const perLayer = Math.min(500, Math.max(60, 8000 / Math.max(1, last)));  // milliseconds
  let playing = null;  // the pending animation frame, null while at rest

  // Between two layers a point is on the straight line that one step draws, x_n + share · h φ_n.
  const between = (axis, layer, share) => frames[layer].data.map((trace, i) => {
    const here = trace[axis];
    if (share === 0) return here;
    const next = frames[layer + 1].data[i][axis];
    return here.map((value, j) => value + share * (next[j] - value));
  });

  const at_once = { mode: "immediate", frame: { duration: 0, redraw: false }, transition: { duration: 0 } };
  const draw = (time) => {
    const layer = Math.min(last, Math.floor(time));
    const share = layer === last ? 0 : time - layer;
    const [xs, ys] = [between("x", layer, share), between("y", layer, share)];
    Plotly.animate(div, { data: xs.map((x, i) => ({ x, y: ys[i] })), traces: moving }, at_once);
  };

  const tell = (layer) => {
    const now = layers[layer];
    document.getElementById("at-layer").textContent = `${layer} of ${last}`;
    document.getElementById("at-accuracy").textContent = now ? now.accuracy : "–";
    document.getElementById("at-distance").textContent = now ? now.distance : "–";
    slider.setAttribute("aria-valuetext", `layer ${layer} of ${last}` +
      (now ? `, test accuracy ${now.accuracy}` : ""));
  };

  const rest = () => {
    if (playing !== null) cancelAnimationFrame(playing);
    playing = null;
    play.textContent = "Play";
  };

  const go = (layer) => {
    rest();
    slider.value = Math.min(last, Math.max(0, layer));
    draw(Number(slider.value));
    tell(Number(slider.value));
  };

  const start = () => {
    let time = Number(slider.value) >= last ? 0 : Number(slider.value);
    let before = null;
    play.textContent = "Pause";
    const step = (now) => {
      // A machine that cannot keep up plays more slowly; it does not skip.
      if (before !== null) time = Math.min(last, time + Math.min(100, now - before) / perLayer);
      before = now;
      const layer = Math.floor(time);
      if (layer !== Number(slider.value)) {
        slider.value = layer;
        tell(layer);
        if (calm.matches) draw(layer);
      }
      if (!calm.matches) draw(time);
      if (time >= last) rest();
      else playing = requestAnimationFrame(step);
    };
    playing = requestAnimationFrame(step);
  };

  const toggle = () => {
    if (playing === null) start();
    else go(Number(slider.value));
  };

  Plotly.newPlot(div, figure.data, figure.layout, config);
  slider.addEventListener("input", () => go(Number(slider.value)));
  slider.addEventListener("keydown", (event) => {
    if (event.key !== " ") return;
    event.preventDefault();
    toggle();
  });
  play.addEventListener("click", toggle);
  document.getElementById("back").addEventListener("click", () => go(Number(slider.value) - 1));
  document.getElementById("forth").addEventListener("click", () => go(Number(slider.value) + 1));
  tell(0);
})();
