"use strict";
// A player of sentences in the making. What it shows comes from a corpus or a model: it is put in as text, never as HTML.

function start(root) {
  const data = JSON.parse(document.getElementById(root.dataset.frames).textContent);
  const last = data.frames.length - 1;
  const [stage, play, slider, view, speed, where] = [".stage", ".play", "input", ".view", ".speed", ".where"]
    .map((name) => root.querySelector(name));
  let at = last, timer = 0;

  function word(number, percent) {
    const span = document.createElement("span");
    span.className = "w";
    span.style.setProperty("--c", percent / 100);
    span.textContent = data.words[number][0];
    span.title = percent + " %";
    return span;
  }

  function show(step) {
    at = Math.max(0, Math.min(last, step));
    const frame = data.frames[at];
    [...stage.children].forEach((line, i) => {
      const found = frame[view.value][i], parts = [];
      for (let j = 0; j < found.length; j += 2) {
        if (j > 0 && data.words[found[j]][1]) parts.push(" ");
        parts.push(word(found[j], found[j + 1]));
      }
      line.replaceChildren(...parts);
    });
    slider.value = at;
    const text = `step ${at + 1} of ${last + 1} · t = ${frame.t} · ${Math.round(100 * frame.noise)} % noise`;
    slider.setAttribute("aria-valuetext", text);
    where.textContent = text;
  }

  function stop() {
    clearTimeout(timer);
    timer = 0;
    play.textContent = "▶ Play";
  }

  function next() {
    show(at + 1);
    if (at === last) stop();
    else timer = setTimeout(next, Number(speed.value));
  }

  function toggle() {
    if (timer) return stop();
    if (at === last) show(0);
    play.textContent = "❚❚ Pause";
    timer = setTimeout(next, Number(speed.value));
  }

  function go(step) {
    stop();
    show(step);
  }

  play.addEventListener("click", toggle);
  slider.addEventListener("input", () => go(Number(slider.value)));
  view.addEventListener("change", () => show(at));
  root.addEventListener("keydown", (event) => {
    const steps = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: last };
    if (event.target === view || event.target === speed || event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key in steps) go(steps[event.key]);
    else if (event.key === " " && event.target !== play) toggle();
    else return;
    event.preventDefault();
  });
  slider.max = last;
  show(last);
  // It begins by itself where nobody asked for less motion: once.
  if (!matchMedia("(prefers-reduced-motion: reduce)").matches) toggle();
}

document.querySelectorAll(".player").forEach(start);
