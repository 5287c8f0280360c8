// One HTML page with plots, in one file: no script, no font, nothing from elsewhere.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace thermocline::cli {

/// Lines over a common x.
struct LinePlot {
  std::string title, x_label, y_label;
  struct Line {
    std::string name;
    std::vector<std::pair<double, double>> points;
  };
  std::vector<Line> lines;
};

/// Bars in rows over time: who did what, when.
struct TimelinePlot {
  std::string title;
  std::vector<std::string> rows;
  struct Bar {
    size_t row = 0;
    double begin = 0, end = 0;  // ms
    std::string what;
  };
  std::vector<Bar> bars;
};

class HtmlPage {
 public:
  explicit HtmlPage(const std::string& title);
  void paragraph(const std::string& text);
  /// The first row is the heading.
  void table(const std::vector<std::vector<std::string>>& rows);
  void plot(const LinePlot& plot);
  void plot(const TimelinePlot& plot);
  std::string text() const { return body_ + "</main></body></html>\n"; }

 private:
  std::string body_;
};

}  // namespace thermocline::cli
