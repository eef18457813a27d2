// Rows in expert order: expert e owns the rows offsets[e] to offsets[e + 1], and a tile of rows belongs to one expert.
#pragma once
#include "prelude.h"

struct RowTile {
    int expert;      // `experts` for the rows that no expert owns (slots whose pair was dropped)
    int begin, end;  // its rows; none if the grid has more tiles than there are
};

// The grid is launched before anybody knows how many rows each expert has: with rows / height + experts + 1 tiles there
// is always one for every part, and the last few have nothing to do. Finding out costs a walk over the offsets.
__device__ __forceinline__ RowTile row_tile(const int *offsets, int experts, int rows, int tile, int height) {
    for (int e = 0; e <= experts; e++) {
        const int begin = offsets[e], end = e < experts ? offsets[e + 1] : rows;
        const int tiles = (end - begin + height - 1) / height;
        if (tile < tiles) return {e, begin + tile * height, min(begin + (tile + 1) * height, end)};
        tile -= tiles;
    }
    return {experts, rows, rows};
}

// How many of them there are.
__device__ __forceinline__ int row_tiles(const int *offsets, int experts, int rows, int height) {
    int tiles = 0;
    for (int e = 0; e <= experts; e++) tiles += ((e < experts ? offsets[e + 1] : rows) - offsets[e] + height - 1) / height;
    return tiles;
}
