/* Runs models that `starfire export --format program` wrote, on the CPU.

   A program may be run by several threads at once. All functions may be called from any thread;
   starfire_free only when nothing runs the program any more. */

#ifndef STARFIRE_H
#define STARFIRE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define STARFIRE_MAX_DIMS 8

typedef struct starfire_program starfire_program;

typedef enum { STARFIRE_INPUT = 0, STARFIRE_OUTPUT = 1 } starfire_side;

/* Loads a program from a file, or from memory, which is copied. The content is checked completely.
   Returns NULL on failure, see starfire_error. */
starfire_program *starfire_load_file(const char *path);
starfire_program *starfire_load(const void *data, size_t size);

/* The number of inputs or outputs. */
int starfire_count(const starfire_program *program, starfire_side side);

/* The name of an input or output; NULL if there is none with this index. */
const char *starfire_name(const starfire_program *program, starfire_side side, int index);

/* Writes the sizes of an input or output to `sizes`, without that of the batch, and returns their
   number; -1 if there is none with this index. */
int starfire_shape(const starfire_program *program, starfire_side side, int index,
                   int64_t sizes[STARFIRE_MAX_DIMS]);

/* Runs a batch of `batch` images. Each input and output is an array of floats in row-major order,
   of the batch's size and then that of starfire_shape. Inputs are not changed.
   Returns 0, or -1 on failure, see starfire_error. */
int starfire_run(starfire_program *program, int64_t batch, const float *const *inputs,
                 float *const *outputs);

/* The number of threads of a program's calls, 1 to 1024: all cores by default. A call that comes while
   another one runs uses one thread. Results don't depend on it. Returns 0, or -1 on failure. */
int starfire_set_threads(starfire_program *program, int threads);

/* The widest instruction set to use: 512, 256 or 128 bits; 0 for the widest of the machine, which is
   the default. Returns 0, or -1 on failure. */
int starfire_set_instructions(starfire_program *program, int bits);

/* Why the latest call of this thread failed: a sentence, valid until the thread's next call. */
const char *starfire_error(void);

/* Frees a program; NULL is ignored. */
void starfire_free(starfire_program *program);

#ifdef __cplusplus
}
#endif

#endif
