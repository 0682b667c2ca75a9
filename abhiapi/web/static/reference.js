// Small comforts of the reference: buttons that copy code, and a price list that follows what is typed. The pages work
// without it.
"use strict";

const statusLine = document.getElementById("status");

for (const figure of document.querySelectorAll("figure.code")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = "Copy";
  const told = (text) => (statusLine.textContent = text);
  copies(button, () => figure.querySelector("code").textContent.replace(/\n$/, ""), told);
  figure.querySelector("figcaption").append(button);
}

const menu = document.querySelector("details.menu");
const narrow = window.matchMedia("(max-width: 60rem)");
const fold = () => (menu.open = !narrow.matches);
narrow.addEventListener("change", fold);
fold();
menu.addEventListener("click", (event) => {
  if (narrow.matches && event.target.closest("a")) menu.open = false;
});

const search = document.querySelector("form.search");
if (search) {
  const field = search.elements.q;
  let waiting = null;
  let asking = null;

  async function show(query, page) {
    asking?.abort();
    asking = new AbortController();
    const words = new URLSearchParams({ q: query, page });
    const place = query || page > 1 ? `?${words}` : "";
    words.set("part", "prices");
    try {
      const answer = await fetch(`/?${words}`, { signal: asking.signal });
      if (!answer.ok) return false;
      const made = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById("price-list");
      document.getElementById("price-list").replaceWith(made);
      history.replaceState(null, "", `${location.pathname}${place}#prices`);
      statusLine.textContent = made.querySelector(".found").textContent;
      return true;
    } catch (error) {
      return error.name === "AbortError";
    }
  }

  field.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => show(field.value.trim(), 1), 120);
  });
  search.addEventListener("submit", async (event) => {
    event.preventDefault();
    clearTimeout(waiting);
    if (!(await show(field.value.trim(), 1))) search.submit();
  });
  search.parentElement.addEventListener("click", async (event) => {
    const link = event.target.closest("nav.pages a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const asked = new URL(link.href).searchParams;
    if (!(await show(asked.get("q"), Number(asked.get("page"))))) location.assign(link.href);
    else document.getElementById("prices").scrollIntoView();
  });
}
