#include "runtime/cli/html_page.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

namespace thermocline::cli {
namespace {

constexpr double kWidth = 760, kHeight = 320, kLeft = 60, kRight = 170, kTop = 30, kBottom = 44;
constexpr double kRowHeight = 26;
constexpr std::array<const char*, 10> kColours = {"#3b6fb6", "#c8553d", "#4d9a6a", "#8a5fa8", "#c9972b",
                                                  "#4aa3b5", "#b34d7a", "#6b6b6b", "#87a330", "#2f4858"};

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) out += c == '<' ? "&lt;" : c == '>' ? "&gt;" : c == '&' ? "&amp;" : std::string(1, c);
  return out;
}

// A step of 1, 2 or 5 times a power of ten that gives some five marks.
double step_of(double range) {
  if (!(range > 0)) return 1;
  const double power = std::pow(10, std::floor(std::log10(range / 5))), x = range / 5 / power;
  return power * (x < 1.5 ? 1 : x < 3.5 ? 2 : x < 7.5 ? 5 : 10);
}

struct Axes {
  double x0 = 0, x1 = 1, y0 = 0, y1 = 1, height = kHeight;
  double x(double v) const { return kLeft + (v - x0) / (x1 - x0) * (kWidth - kLeft - kRight); }
  double y(double v) const { return height - kBottom - (v - y0) / (y1 - y0) * (height - kTop - kBottom); }
};

std::string open_svg(const std::string& title, double height) {
  return fmt::format("<h2>{}</h2>\n<svg viewBox='0 0 {} {}' role='img' aria-label='{}'>\n", escaped(title), kWidth,
                     height, escaped(title));
}

std::string x_axis(const Axes& axes, const std::string& label) {
  std::string out;
  const double step = step_of(axes.x1 - axes.x0), bottom = axes.height - kBottom;
  for (double v = std::ceil(axes.x0 / step) * step; v <= axes.x1 + step / 1e6; v += step)
    out += fmt::format(
        "<line class='grid' x1='{0:.1f}' x2='{0:.1f}' y1='{1}' y2='{2:.1f}'/><text x='{0:.1f}' y='{3:.1f}' "
        "text-anchor='middle'>{4:g}</text>\n",
        axes.x(v), kTop, bottom, bottom + 16, v);
  return out + fmt::format("<text x='{:.1f}' y='{:.1f}' text-anchor='middle'>{}</text>\n",
                           (kLeft + kWidth - kRight) / 2, axes.height - 8, escaped(label));
}

std::string y_axis(const Axes& axes, const std::string& label) {
  std::string out;
  const double step = step_of(axes.y1 - axes.y0);
  for (double v = std::ceil(axes.y0 / step) * step; v <= axes.y1 + step / 1e6; v += step)
    out += fmt::format(
        "<line class='grid' x1='{0}' x2='{1}' y1='{2:.1f}' y2='{2:.1f}'/><text x='{3}' y='{4:.1f}' "
        "text-anchor='end'>{5:g}</text>\n",
        kLeft, kWidth - kRight, axes.y(v), kLeft - 6, axes.y(v) + 4, v);
  return out + fmt::format("<text x='{}' y='{}'>{}</text>\n", 6, kTop - 12, escaped(label));
}

}  // namespace

HtmlPage::HtmlPage(const std::string& title) {
  body_ = fmt::format(
      "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'><title>{0}</title>\n<meta name='viewport' "
      "content='width=device-width'>\n<style>body{{font:15px/1.5 system-ui,sans-serif;color:#222;background:#fff}}"
      "main{{max-width:860px;margin:2rem auto;padding:0 1rem}}svg{{width:100%;height:auto;font-size:11px}}"
      "h1{{font-size:1.4rem}}h2{{font-size:1.05rem;margin:1.8rem 0 .4rem}}.grid{{stroke:#e4e4e4}}"
      "table{{border-collapse:collapse;font-size:13px;font-variant-numeric:tabular-nums;display:block;overflow-x:auto}}"
      "td,th{{padding:.2rem .6rem;border-bottom:1px solid #e4e4e4;text-align:right;white-space:nowrap}}"
      "td:first-child,th:first-child{{text-align:left}}</style></head>\n<body><main><h1>{0}</h1>\n",
      escaped(title));
}

void HtmlPage::paragraph(const std::string& text) { body_ += "<p>" + escaped(text) + "</p>\n"; }

void HtmlPage::table(const std::vector<std::vector<std::string>>& rows) {
  body_ += "<table>\n";
  for (size_t i = 0; i < rows.size(); ++i) {
    body_ += "<tr>";
    for (const std::string& cell : rows[i]) body_ += fmt::format("<{0}>{1}</{0}>", i == 0 ? "th" : "td", escaped(cell));
    body_ += "</tr>\n";
  }
  body_ += "</table>\n";
}

void HtmlPage::plot(const LinePlot& plot) {
  Axes axes{INFINITY, -INFINITY, 0, 0, kHeight};
  for (const LinePlot::Line& line : plot.lines)
    for (const auto& [x, y] : line.points) {
      axes.x0 = std::min(axes.x0, x);
      axes.x1 = std::max(axes.x1, x);
      axes.y1 = std::max(axes.y1, y);
    }
  if (!(axes.x1 > axes.x0)) axes.x0 = std::isfinite(axes.x0) ? axes.x0 - 1 : 0, axes.x1 = axes.x0 + 2;
  axes.y1 = axes.y1 > 0 ? 1.05 * axes.y1 : 1;
  body_ += open_svg(plot.title, kHeight) + x_axis(axes, plot.x_label) + y_axis(axes, plot.y_label);
  for (size_t i = 0; i < plot.lines.size(); ++i) {
    const LinePlot::Line& line = plot.lines[i];
    const char* const colour = kColours[i % kColours.size()];
    std::string points, dots;
    for (const auto& [x, y] : line.points) {
      points += fmt::format("{:.1f},{:.1f} ", axes.x(x), axes.y(y));
      if (line.points.size() <= 24)
        dots += fmt::format("<circle cx='{:.1f}' cy='{:.1f}' r='3' fill='{}'><title>{}: {:g}, {:g}</title></circle>\n",
                            axes.x(x), axes.y(y), colour, escaped(line.name), x, y);
    }
    const double key = kTop + 10 + 17 * static_cast<double>(i);
    body_ += fmt::format("<polyline points='{}' fill='none' stroke='{}' stroke-width='2'/>\n{}", points, colour, dots);
    body_ += fmt::format(
        "<line x1='{0}' x2='{1}' y1='{2}' y2='{2}' stroke='{3}' stroke-width='3'/><text x='{4}' y='{5}'>{6}</text>\n",
        kWidth - kRight + 14, kWidth - kRight + 32, key, colour, kWidth - kRight + 38, key + 4, escaped(line.name));
  }
  body_ += "</svg>\n";
}

void HtmlPage::plot(const TimelinePlot& plot) {
  Axes axes{0, 1e-9, 0, 1, kTop + kBottom + kRowHeight * static_cast<double>(plot.rows.size())};
  for (const TimelinePlot::Bar& bar : plot.bars) axes.x1 = std::max(axes.x1, bar.end);
  body_ += open_svg(plot.title, axes.height) + x_axis(axes, "ms");
  std::vector<std::string> kinds;
  for (size_t i = 0; i < plot.rows.size(); ++i)
    body_ += fmt::format("<text x='{}' y='{:.1f}' text-anchor='end'>{}</text>\n", kLeft - 6,
                         kTop + kRowHeight * (static_cast<double>(i) + 0.65), escaped(plot.rows[i]));
  for (const TimelinePlot::Bar& bar : plot.bars) {
    auto kind = std::find(kinds.begin(), kinds.end(), bar.what);
    if (kind == kinds.end()) kind = kinds.insert(kinds.end(), bar.what);
    const char* const colour = kColours[static_cast<size_t>(kind - kinds.begin()) % kColours.size()];
    body_ += fmt::format(
        "<rect x='{:.2f}' y='{:.1f}' width='{:.2f}' height='{}' fill='{}'><title>{}: {:.3f} to {:.3f} "
        "ms</title></rect>\n",
        axes.x(bar.begin), kTop + kRowHeight * static_cast<double>(bar.row) + 4,
        std::max(0.3, axes.x(bar.end) - axes.x(bar.begin)), kRowHeight - 8, colour, escaped(bar.what), bar.begin,
        bar.end);
  }
  for (size_t i = 0; i < kinds.size(); ++i) {
    const double y = kTop + 4 + 17 * static_cast<double>(i);
    body_ += fmt::format("<rect x='{}' y='{}' width='12' height='12' fill='{}'/><text x='{}' y='{}'>{}</text>\n",
                         kWidth - kRight + 14, y, kColours[i % kColours.size()], kWidth - kRight + 32, y + 10,
                         escaped(kinds[i]));
  }
  body_ += "</svg>\n";
}

}  // namespace thermocline::cli
