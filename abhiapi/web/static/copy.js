// Buttons that copy. Any page works without them.
"use strict";

async function copied(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Pages that come by plain http have no clipboard.
    const area = document.createElement("textarea");
    area.value = text;
    area.className = "off-screen";
    document.body.append(area);
    area.select();
    const done = document.execCommand("copy");
    area.remove();
    return done;
  }
}

// What is to be copied is asked for when the button is pressed; `told` hears what came of it, and that it is over.
function copies(button, what, told = () => {}) {
  const label = button.innerHTML;
  button.addEventListener("click", async () => {
    const done = await copied(what());
    button.textContent = done ? "Copied" : "Select and copy";
    told(done ? "Copied to the clipboard" : "The browser does not allow copying");
    button.focus();
    setTimeout(() => {
      button.innerHTML = label;
      told("");
    }, 2000);
  });
}
