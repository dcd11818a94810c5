// Runs a kernel's program over the grid; included by every kernel after its program.
//
// Programs take their numbers from one counter. The calling thread runs them alone until
// it is clear that the rest takes longer than waking other threads does.
#include <stdlib.h>
#include <time.h>

#define ALONE_NS 50000
#define WORTH_THREADS_NS 100000

typedef void (*parallel_function)(void (*work)(void *), void *, unsigned, unsigned);

struct job {
  const struct arguments *given;
  int64_t programs, next, until;
  const char *volatile failure;
};

static int64_t now_ns(void) {
  struct timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1000000000ll + now.tv_nsec;
}

static void work(void *data) {
  struct job *job = data;
  const struct arguments *given = job->given;
  char *arena = ARENA_BYTES ? aligned_alloc(64, ARENA_BYTES) : 0;
  if (ARENA_BYTES && !arena) {
    job->failure = "out of memory";
    return;
  }
  while (!job->failure && !(job->until && now_ns() > job->until)) {
    int64_t number = __atomic_fetch_add(&job->next, 1, __ATOMIC_RELAXED);
    if (number >= job->programs) break;
    int64_t rest = number / given->grid_x;
    const char *failure = program(given, arena, number % given->grid_x,
                                  rest % given->grid_y, rest / given->grid_y);
    if (failure) job->failure = failure;
  }
  free(arena);
}

// Returns what an assert said, or nothing.
__attribute__((visibility("default")))
const char *launch(const struct arguments *given, parallel_function parallel, int threads) {
  struct job job = {given, (int64_t)given->grid_x * given->grid_y * given->grid_z};
  int64_t start = 0;
  if (threads > 1 && job.programs > 1) {
    start = now_ns();
    job.until = start + ALONE_NS;
  }
  work(&job);
  if (job.until && !job.failure && job.next < job.programs) {
    int64_t left = job.programs - job.next;
    int64_t expected_ns = (now_ns() - start) / job.next * left;
    job.until = 0;
    if (expected_ns > WORTH_THREADS_NS)
      parallel(work, &job, left < threads ? left : threads, 0);
    else
      work(&job);
  }
  return job.failure;
}
