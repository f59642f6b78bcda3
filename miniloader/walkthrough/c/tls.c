/* One variable, two threads, two addresses.   cc -Wall -Wextra -pthread tls.c && ./a.out */
#include <pthread.h>
#include <stdio.h>

static __thread long visits = 1000;              /* the template, in PT_TLS */

static void *visit(void *times)
{
    for (int number = 0; number < *(int *)times; number++)
        visits++;
    printf("visits at %p is %ld\n", (void *)&visits, visits);
    return (void *)(visits - 1000);
}

int main(void)
{
    pthread_t threads[2];
    int times[2] = {1, 3};
    void *counted[2];
    for (int number = 0; number < 2; number++)
        pthread_create(&threads[number], NULL, visit, &times[number]);
    for (int number = 0; number < 2; number++)
        pthread_join(threads[number], &counted[number]);
    printf("and here it is %ld\n", visits);
    return !(visits == 1000 && (long)counted[0] == 1 && (long)counted[1] == 3);
}
