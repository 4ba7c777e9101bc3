// Grid-wide synchronisation of a cooperative launch.
#pragma once

namespace cooperative_groups {
struct grid_group {
  void sync() const;
};
inline grid_group this_grid() { return {}; }
}  // namespace cooperative_groups
