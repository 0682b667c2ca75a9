// The playground, handier: the estimate follows the form, and a call that runs says for how long. Works without it.
"use strict";

for (const form of document.querySelectorAll("form[data-playground]")) {
  const credits = form.querySelector("[data-credits]");
  const basis = form.querySelector("[data-basis]");
  const progress = form.querySelector("[data-progress]");
  let waiting = 0;
  let asked = 0;

  const estimate = async () => {
    const number = ++asked;
    let said;
    try {
      const answer = await fetch(form.dataset.estimate, { method: "POST", body: new URLSearchParams(new FormData(form)) });
      if (!answer.ok) return;
      said = await answer.json();
    } catch {
      return; // signed out, or the network: the button asks again
    }
    if (number !== asked) return; // an older question's answer
    credits.textContent = said.credits ?? "–";
    basis.textContent = said.problem ?? said.basis;
    for (const [language, text] of Object.entries(said.samples ?? {})) {
      const shown = document.querySelector(`[data-sample="${language}"]`);
      if (shown) shown.textContent = text;
    }
  };

  for (const button of form.querySelectorAll("[data-by-hand]")) button.hidden = true;
  form.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(estimate, 300);
  });
  form.addEventListener("submit", (event) => {
    if (form.dataset.running) {
      event.preventDefault();
      return;
    }
    form.dataset.running = "yes";
    const started = Date.now();
    const tell = () => {
      progress.textContent = `Running for ${Math.round((Date.now() - started) / 1000)} s. The answer comes to this page.`;
    };
    progress.hidden = false;
    tell();
    form.dataset.timer = setInterval(tell, 1000);
  });
  addEventListener("pageshow", (event) => {
    if (!event.persisted) return; // back by the browser's button: the page is as it was left
    delete form.dataset.running;
    clearInterval(Number(form.dataset.timer));
    progress.hidden = true;
  });
}
