// Answers open where a link points into them.
function openAnswer() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  target?.closest("details")?.setAttribute("open", "");
}
addEventListener("hashchange", openAnswer);
addEventListener("DOMContentLoaded", openAnswer);
