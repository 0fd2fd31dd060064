/* Panels: a few rows of rounded x that pass by the weights together. For each pair (bfloat16) or four (int8) of columns the rows stand side by
 * side. Panels share the rows evenly, so that none is nearly empty.
 */
#ifndef OPTKIT_PANELS_H
#define OPTKIT_PANELS_H
#include "few.h"

#if defined(__AVX512F__)
enum { PANEL = 12, WIDE = 2, FEW_WIDE = 4 }; /* 12 rows by 2 blocks, or 4 rows by 4, fill the registers */
#else
enum { PANEL = 2, WIDE = 2, FEW_WIDE = 2 };
#endif

INLINE int64_t panels_of(int64_t m) { return (m + PANEL - 1) / PANEL; }
INLINE int64_t panel_start(int64_t m, int64_t panel) { return m * panel / panels_of(m); }

/* Call body(rows) with the number of rows as a constant. */
#define ROW_CASE(n, body) \
    case n: body(n); break;
#if defined(__AVX512F__)
#define WITH_ROWS(rows, body)                                                                                                   \
    switch (rows) {                                                                                                             \
        ROW_CASE(1, body) ROW_CASE(2, body) ROW_CASE(3, body) ROW_CASE(4, body) ROW_CASE(5, body) ROW_CASE(6, body)             \
        ROW_CASE(7, body) ROW_CASE(8, body) ROW_CASE(9, body) ROW_CASE(10, body) ROW_CASE(11, body) ROW_CASE(12, body)          \
    }
#define WITH_FEW_ROWS(rows, body)                                                           \
    switch (rows) {                                                                         \
        ROW_CASE(1, body) ROW_CASE(2, body) ROW_CASE(3, body) ROW_CASE(4, body)             \
    }
#else
#define WITH_ROWS(rows, body)               \
    switch (rows) {                         \
        ROW_CASE(1, body) ROW_CASE(2, body) \
    }
#define WITH_FEW_ROWS WITH_ROWS
#endif

#endif
