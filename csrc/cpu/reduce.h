// Sums, maxima and their ties along the rows or the columns of a sample's matrix.
#pragma once

#include "load_store.h"

namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY {

// std::conditional
template <bool condition, class Then, class Else>
struct Choose {
  using type = Then;
};
template <class Then, class Else>
struct Choose<false, Then, Else> {
  using type = Else;
};

// The running maximum of each lane, and with it the index of the first one or the number of them. Only with `exact`
// does a NaN count as the maximum, as it must; the caller sees by the sum, which is then NaN too, that it needs that
// form.
template <class A, Ties ties, bool exact>
struct Maximum {
  using I = Index<A>;
  using Ascending = typename Choose<exact, GreaterOrFirstNan, Greater>::type;
  using Descending = typename Choose<exact, GreaterEqualOrNan, GreaterEqual>::type;
  using Same = typename Choose<exact, EqualOrBothNan, Equal>::type;
  Vector<A> value;
  Vector<I> tie;

  static Maximum lowest(const Vector<I>& index) {
    return {broadcast(A(-__builtin_huge_val())), ties == Ties::kEven ? Vector<I>{} : index};
  }

  // Visits v, whose index is larger than all seen before.
  void ascend(const Vector<A>& v, const Vector<I>& index) {
    if constexpr (kValueOnly)
      value = larger(v, value);
    else
      visit(v, index, Ascending());
  }
  // Visits v, whose index is smaller than all seen before.
  void descend(const Vector<A>& v, const Vector<I>& index) {
    if constexpr (kValueOnly)
      value = larger(value, v);
    else
      visit(v, index, Descending());
  }

  // Adds what other lanes of the same row saw.
  void merge(const Maximum& other) {
    if constexpr (kValueOnly) return descend(other.value, {});
    const Maximum old = *this;
    value = select(other.value, value, Descending(), other.value, value);
    if constexpr (ties == Ties::kFirst) {
      const Vector<I> last = broadcast(I(INT32_MAX));
      const Vector<I> mine = select(old.value, value, Same(), old.tie, last);
      const Vector<I> theirs = select(other.value, value, Same(), other.tie, last);
      tie = select(theirs, mine, Less(), theirs, mine);
    }
    if constexpr (ties == Ties::kEven)
      tie = select(old.value, value, Equal(), old.tie, Vector<I>{}) +
            select(other.value, value, Equal(), other.tie, Vector<I>{});
  }
  // Undoes the last visit in lanes from `count` on.
  void keep(const Maximum& old, int64_t count) {
    const Vector<I> lane = iota<I>(), limit = broadcast(I(count));
    value = select(lane, limit, Less(), value, old.value);
    tie = select(lane, limit, Less(), tie, old.tie);
  }
  // The maximum over lanes.
  A fold_value() const {
    return fold(value, [](Native<A> s, Native<A> t) { return Descending()(s, t) ? s : t; });
  }
  // The smallest index of the maximum over lanes, or the sum of its counts.
  void fold_tie(int32_t* index) const {
    const A best = fold_value();
    if constexpr (ties == Ties::kFirst) {
      const Vector<I> last = broadcast(I(INT32_MAX));
      const Vector<I> candidates = select(value, broadcast(best), Same(), tie, last);
      *index = int32_t(fold(candidates, [](Native<I> s, Native<I> t) { return s < t ? s : t; }));
    }
    if constexpr (ties == Ties::kEven) {
      const Vector<I> counts = select(value, broadcast(best), Equal(), tie, Vector<I>{});
      *index = int32_t(fold(counts, [](Native<I> s, Native<I> t) { return s + t; }));
    }
  }

 private:
  static constexpr bool kValueOnly = ties == Ties::kNone && !exact;

  template <class Condition>
  void visit(const Vector<A>& v, const Vector<I>& index, Condition condition) {
    const Vector<A> highest = select(v, value, condition, v, value);
    if constexpr (ties == Ties::kFirst) tie = select(v, value, condition, index, tie);
    // Nothing equals a NaN, so its count stays 0 once the maximum is one.
    if constexpr (ties == Ties::kEven)
      tie =
          select(value, highest, Equal(), tie, Vector<I>{}) + select(v, highest, Equal(), broadcast(I(1)), Vector<I>{});
    value = highest;
  }
};

// Sums along a row are made of blocks, so that no chain of additions is long enough to lose precision.
constexpr int64_t kBlockColumns = 512;
constexpr int kChains = 4;

// The sum and the maximum of one row, still apart by lanes.
template <bool exact, class T, Ties ties, bool scaled>
inline void reduce_row(const T* source, int64_t columns, const Compute<T>* column_scale,
                       const ColumnValues<T>* ordered,  // column_scale, or null
                       Vector<Compute<T>>& total, Maximum<Compute<T>, ties, exact>& maximum) {
  using A = Compute<T>;
  using Max = Maximum<A, ties, exact>;
  constexpr int64_t kLanes = Vector<A>::kLanes, kStep = kChains * kLanes;
  const Vector<Index<A>> lane = iota<Index<A>>();
  total = {};
  Max maxima[kChains];
  for (Max& m : maxima) m = Max::lowest(lane);
  const int64_t full = columns / kLanes * kLanes;
  for (int64_t begin = 0; begin < full; begin += kBlockColumns) {
    const int64_t end = begin + kBlockColumns < full ? begin + kBlockColumns : full;
    Vector<A> sums[kChains] = {};
    int64_t j = begin;
    for (; j + kStep <= end; j += kStep)
      for (int pair = 0; pair < kChains / 2; ++pair) {
        const int64_t at = j + pair * 2 * kLanes;
        prefetch_read(source + at, kPrefetch<T>);
        const Pair<A> values = load_pair(source + at);
        const Pair<Index<A>> indices = column_indices<T>(at);
        Pair<A> scales;
        if (scaled) scales = ordered ? (*ordered)[at] : load_columns<T>(column_scale + at);
        for (int part = 0; part < 2; ++part) {
          const int chain = 2 * pair + part;
          const Vector<A> v = scaled ? values.part[part] * scales.part[part] : values.part[part];
          sums[chain] = sums[chain] + v;
          maxima[chain].ascend(v, indices.part[part]);
        }
      }
    for (; j < end; j += kLanes) {
      const Vector<A> v = scaled ? load(source + j) * load(column_scale + j) : load(source + j);
      sums[0] = sums[0] + v;
      maxima[0].ascend(v, lane + broadcast(Index<A>(j)));
    }
    total = total + ((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }
  if (full >= kStep) {
    maxima[0].merge(maxima[1]);
    maxima[2].merge(maxima[3]);
    maxima[0].merge(maxima[2]);
  }
  if (full < columns) {
    Vector<A> v = load_first(source + full, columns - full);
    if (scaled) v = v * load_first(column_scale + full, columns - full);
    total = total + v;
    const Max old = maxima[0];
    maxima[0].ascend(v, lane + broadcast(Index<A>(full)));
    maxima[0].keep(old, columns - full);
  }
  maximum = maxima[0];
}

template <class T, Ties ties, bool scaled>
void reduce_rows(const T* x, int64_t columns, int64_t row_begin, int64_t row_end, const Compute<T>* column_scale,
                 Compute<T>* sum, Compute<T>* max, int32_t* tie) {
  using A = Compute<T>;
  const bool few = columns <= ColumnValues<T>::kMost;
  const ColumnValues<T> values(column_scale, scaled && few ? columns : 0);
  const ColumnValues<T>* ordered = few ? &values : nullptr;
  for (int64_t begin = row_begin; begin < row_end; begin += kFolded) {
    const int64_t rows = row_end - begin < kFolded ? row_end - begin : kFolded;
    Vector<A> totals[kFolded], highest[kFolded];
    for (int64_t i = rows; i < kFolded; ++i) totals[i] = highest[i] = {};
    for (int64_t i = 0; i < rows; ++i) {
      Maximum<A, ties, false> maximum;
      reduce_row<false, T, ties, scaled>(x + (begin + i) * columns, columns, column_scale, ordered, totals[i], maximum);
      highest[i] = maximum.value;
      if (ties != Ties::kNone) maximum.fold_tie(tie + begin + i);
    }
    A sums[kFolded], maxima[kFolded];
    sums_of(totals, sums);
    maxima_of(highest, maxima);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t row = begin + i;
      sum[row] = sums[i];
      max[row] = maxima[i];
      if (sums[i] == sums[i]) continue;
      Maximum<A, ties, true> maximum;
      reduce_row<true, T, ties, scaled>(x + row * columns, columns, column_scale, ordered, totals[i], maximum);
      max[row] = maximum.fold_value();
      if (ties != Ties::kNone) maximum.fold_tie(tie + row);
    }
  }
}

// Rows of a column sum are added in groups of kGroupRows, as a tree, so that the columns' running values are loaded
// and stored once a group.
constexpr int64_t kGroupRows = 8;
constexpr int64_t kTileColumns = 2048;

// The sums of a tile's columns, one vector of each group of rows at a time. Groups are added pairwise, pairs of pairs
// likewise, up to kTreeGroups, before they are added to the total: no chain of additions is long enough to lose
// precision.
constexpr int kTreeLevels = 6;
template <class A, int kLevels = kTreeLevels>
class ColumnSums {
 public:
  ColumnSums(A* total, int64_t tile, int64_t tile_end) : total_(total), tile_(tile), tile_end_(tile_end) {}

  // Adds the vector at column j of the current group.
  void add(int64_t j, Vector<A> v, int64_t count) {
    const int64_t at = j - tile_;
    for (int level = 0; level < carries_; ++level) v = load_some(levels_[level] + at, count) + v;
    store_some(levels_[carries_] + at, v, count);
  }
  // Ends a group; `last` ends the sum.
  void end_group(bool last) {
    ++groups_;
    if (groups_ == kTreeGroups || last) add_to_total();
    for (carries_ = 0; groups_ >> carries_ & 1;) ++carries_;
  }

 private:
  static constexpr int kTreeGroups = 1 << kLevels;

  void add_to_total() {
    for_vectors<Vector<A>::kLanes>(tile_, tile_end_, [&](int64_t j, int64_t count) {
      Vector<A> leaf = {};
      for (int level = 0; level <= kLevels; ++level)
        if (groups_ >> level & 1) leaf = leaf + load_some(levels_[level] + (j - tile_), count);
      store_some(total_ + j, first_ ? leaf : load_some(total_ + j, count) + leaf, count);
    });
    groups_ = 0;
    first_ = false;
  }

  A* total_;
  int64_t tile_, tile_end_;
  int groups_ = 0, carries_ = 0;  // groups in the levels, and how many levels the next one completes
  bool first_ = true;
  A levels_[kLevels + 1][kTileColumns];
};

template <class A>
inline Vector<A> tree_sum(const Vector<A>* v) {
  return ((v[0] + v[1]) + (v[2] + v[3])) + ((v[4] + v[5]) + (v[6] + v[7]));
}

// body(whole, column, count) for each vector of [begin, end), where whole.value says at compile time that the group has
// all its rows, so that they stay in registers.
template <int kLanes, class F>
inline __attribute__((always_inline)) void for_groups(bool whole, int64_t begin, int64_t end, F body) {
  if (whole)
    for_vectors<kLanes>(begin, end,
                        [&](int64_t j, int64_t count) __attribute__((always_inline)) { body(True(), j, count); });
  else
    for_vectors<kLanes>(begin, end,
                        [&](int64_t j, int64_t count) __attribute__((always_inline)) { body(False(), j, count); });
}

template <bool exact, class T, Ties ties, bool scaled>
void reduce_tile(const T* x, int64_t rows, int64_t columns, int64_t tile, int64_t tile_end, const Compute<T>* row_scale,
                 Compute<T>* sum, Compute<T>* max, int32_t* tie) {
  using A = Compute<T>;
  using Max = Maximum<A, ties, exact>;
  constexpr int64_t kLanes = Vector<A>::kLanes;
  ColumnSums<A> sums(sum, tile, tile_end);
  for (int64_t row_end = rows; row_end > 0; row_end -= kGroupRows) {
    const bool first = row_end == rows;
    const int64_t row = row_end - kGroupRows;
    const auto group = [&](auto whole, int64_t j, int64_t count) __attribute__((always_inline)) {
      Max maximum = Max::lowest(Vector<Index<A>>{});
      if (!first) maximum.value = load_some(max + j, count);
      if (!first && ties != Ties::kNone) maximum.tie = load_indices<A>(tie + j, count);
      Vector<A> v[kGroupRows] = {};
      for (int64_t k = kGroupRows - 1; k >= 0; --k) {
        if (!whole.value && row + k < 0) break;
        v[k] = load_some(x + (row + k) * columns + j, count);
        __builtin_prefetch(x + (row + k - kGroupRows) * columns + j, 0, 2);
        if (scaled) v[k] = v[k] * broadcast(row_scale[row + k]);
        maximum.descend(v[k], broadcast(Index<A>(row + k)));
      }
      sums.add(j, tree_sum(v), count);
      store_some(max + j, maximum.value, count);
      if (ties != Ties::kNone) store_indices<A>(tie + j, maximum.tie, count);
    };
    int64_t begin = tile;
    if (kInterleaved<T> && ties == Ties::kNone && row >= 0)
      for (; begin + 2 * kLanes <= tile_end; begin += 2 * kLanes) {
        Pair<A> best = {{broadcast(A(-__builtin_huge_val())), broadcast(A(-__builtin_huge_val()))}};
        if (!first) best = load_columns<T>(max + begin);
        Vector<A> v[2][kGroupRows];
        for (int64_t k = kGroupRows - 1; k >= 0; --k) {
          const Pair<A> values = load_pair(x + (row + k) * columns + begin);
          __builtin_prefetch(x + (row + k - kGroupRows) * columns + begin, 0, 2);
          for (int part = 0; part < 2; ++part) {
            v[part][k] = scaled ? values.part[part] * broadcast(row_scale[row + k]) : values.part[part];
            Max maximum = {best.part[part], {}};
            maximum.descend(v[part][k], {});
            best.part[part] = maximum.value;
          }
        }
        const Pair<A> totals = in_columns<T>(Pair<A>{{tree_sum(v[0]), tree_sum(v[1])}}), highest = in_columns<T>(best);
        for (int part = 0; part < 2; ++part) {
          sums.add(begin + part * kLanes, totals.part[part], kLanes);
          store(max + begin + part * kLanes, highest.part[part]);
        }
      }
    for_groups<kLanes>(row >= 0, begin, tile_end, group);
    sums.end_group(row <= 0);
  }
}

template <class T, Ties ties, bool scaled>
void reduce_columns(const T* x, int64_t rows, int64_t columns, int64_t column_begin, int64_t column_end,
                    const Compute<T>* row_scale, Compute<T>* sum, Compute<T>* max, int32_t* tie) {
  for (int64_t tile = column_begin; tile < column_end; tile += kTileColumns) {
    const int64_t tile_end = tile + kTileColumns < column_end ? tile + kTileColumns : column_end;
    reduce_tile<false, T, ties, scaled>(x, rows, columns, tile, tile_end, row_scale, sum, max, tie);
    bool nan = false;
    for (int64_t j = tile; j < tile_end; ++j) nan |= sum[j] != sum[j];
    if (nan) reduce_tile<true, T, ties, scaled>(x, rows, columns, tile, tile_end, row_scale, sum, max, tie);
  }
}

// A leaf is a subtree of ColumnSums, this many levels of it: merging leaves does the levels above.
constexpr int kLeafLevels = 3;
static_assert(kColumnLeafRows == kGroupRows << kLeafLevels);

template <class A, Ties ties>
void merge_leaves(const A* sums, const A* maxima, const int32_t* leaf_ties, int64_t rows, int64_t columns,
                  int64_t column_begin, int64_t column_end, A* sum, A* max, int32_t* tie) {
  using Max = Maximum<A, ties, true>;
  const int64_t leaves = (rows + kColumnLeafRows - 1) / kColumnLeafRows;
  for (int64_t tile = column_begin; tile < column_end; tile += kTileColumns) {
    const int64_t tile_end = tile + kTileColumns < column_end ? tile + kTileColumns : column_end;
    ColumnSums<A, kTreeLevels - kLeafLevels> totals(sum, tile, tile_end);
    for (int64_t leaf = 0; leaf < leaves; ++leaf) {
      const int64_t last_row = rows - leaf * kColumnLeafRows;
      const auto first_row = broadcast(Index<A>(last_row > kColumnLeafRows ? last_row - kColumnLeafRows : 0));
      for_vectors<Vector<A>::kLanes>(tile, tile_end, [&](int64_t j, int64_t count) __attribute__((always_inline)) {
        const int64_t at = leaf * columns + j;
        totals.add(j, load_some(sums + at, count), count);
        Max maximum = {load_some(maxima + at, count), {}};
        if (ties != Ties::kNone) maximum.tie = load_indices<A>(leaf_ties + at, count);
        if (ties == Ties::kFirst) maximum.tie = maximum.tie + first_row;
        if (leaf > 0) {
          Max before = {load_some(max + j, count), {}};
          if (ties != Ties::kNone) before.tie = load_indices<A>(tie + j, count);
          maximum.merge(before);
        }
        store_some(max + j, maximum.value, count);
        if (ties != Ties::kNone) store_indices<A>(tie + j, maximum.tie, count);
      });
      totals.end_group(leaf + 1 == leaves);
    }
  }
}

}  // namespace cbam_fused::cpu::CBAM_CPU_CAPABILITY
