// Makes pages handier; every page works without it.
"use strict";

for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = false;
  copies(button, () => document.getElementById(button.dataset.copy).textContent);
}

// On a phone the navigation is wider than the window: what is open is in sight.
document.querySelector(".nav [aria-current]")?.scrollIntoView({ block: "nearest", inline: "center" });
