#include "runtime/base/edit_distance.h"

#include <gtest/gtest.h>

namespace thermocline {
namespace {

TEST(EditDistance, CountsLettersAndNoCase) {
  EXPECT_EQ(edits("", ""), 0u);
  EXPECT_EQ(edits("", "abc"), 3u);
  EXPECT_EQ(edits("kitten", "sitting"), 3u);
  EXPECT_EQ(edits("Port", "pORT"), 0u);
  EXPECT_EQ(edits("prot", "port"), 2u);
  EXPECT_EQ(edits("port", "prot"), edits("prot", "port"));
}

TEST(EditDistance, NearestIsNearAndTheFirstOfTwo) {
  const std::vector<std::string> known = {"serve", "run", "bench", "runs"};
  EXPECT_EQ(nearest("srve", known), "serve");
  EXPECT_EQ(nearest("runn", known), "run");
  EXPECT_EQ(nearest("runz", known), "run");
  EXPECT_EQ(nearest("xy", known), "");
  EXPECT_EQ(nearest("completely", known), "");
  EXPECT_EQ(nearest(std::string(1000, 'x'), {std::string(1000, 'x')}), "");  // no quadratic work for anybody's text
  EXPECT_EQ(nearest("serve", {}), "");
}

}  // namespace
}  // namespace thermocline
